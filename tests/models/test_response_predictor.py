"""From designs to responses, by a network."""

import json
import math

import pytest
import torch
from torch import Tensor

from mechdiffusers.models import ResponseEncoder, ResponsePredictor, response_normalisation

SPEC = {"quantity": "stress", "load_cases": ["a", "b"], "strains": [[0.1, 0.2, 0.3]] * 2}


def predictor(**options) -> ResponsePredictor:
    torch.manual_seed(0)
    return ResponsePredictor(
        **{
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "spec": SPEC,
            "scale": [[0.5, 1.0, 2.0]] * 2,
            "mean": [[1.0, 2.0, 3.0]] * 2,
            "std": [[2.0, 1.0, 0.5]] * 2,
            **options,
        }
    )


def encoder_of(model: ResponsePredictor) -> ResponseEncoder:
    """The encoder of the same responses, which a pipeline takes their normalisation from."""
    return ResponseEncoder(8, **{name: model.config[name] for name in ("spec", "scale", "mean", "std")})


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (64, 48), (5, 7)])
@pytest.mark.parametrize("widths", [(4,), (4, 8), (6, 6, 12, 12)])
def test_designs_of_any_size_have_responses_of_one_shape(size, widths):
    found = predictor(block_out_channels=widths)(torch.rand(3, 1, *size))
    assert found.shape == (3, 2, 3)
    assert found.isfinite().all()


def test_denormalise_is_the_inverse_of_normalise():
    model = predictor()
    response = torch.cat([-torch.logspace(-3, 3, 50), torch.zeros(1), torch.logspace(-3, 3, 50)])
    response = response[:, None, None].expand(-1, 2, 3).clone()
    response[0, 1, 2] = math.nan
    again = model.denormalise(encoder_of(model).normalise(response))
    torch.testing.assert_close(again, response, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_predictions_are_in_the_units_of_the_scale():
    images = torch.rand(4, 1, 8, 8)
    in_kilo = predictor(scale=[[5e-4, 1e-3, 2e-3]] * 2)
    torch.testing.assert_close(in_kilo.predict(images), predictor().predict(images) / 1000)
    by_hand = torch.sinh(predictor()(images) * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(predictor().predict(images), by_hand * torch.tensor([0.5, 1.0, 2.0]))


def test_weights_in_half_precision_predict_in_single():
    images = torch.rand(4, 1, 8, 8)
    found = predictor().to(torch.bfloat16).predict(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, predictor().predict(images), rtol=0.3, atol=0)


SYMMETRIES = {"half_turn": [0, 1], "mirror": [0, None], "transpose": [1, 0]}


def test_a_turned_design_is_predicted_to_respond_as_the_symmetries_say():
    model, images = predictor(symmetries=SYMMETRIES).double().eval(), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    found = model(images)
    assert not torch.allclose(model(images.flip(-1, -2)), found, rtol=1e-3)  # not of itself
    itself = predictor(symmetries={"half_turn": [0, 1]}).double().eval()
    torch.testing.assert_close(itself.predict(images.flip(-1, -2)), itself.predict(images))
    mirrored = predictor(symmetries={"mirror": [0, None]}).double().eval()
    both = mirrored.predict(images), mirrored.predict(images.flip(-1))
    torch.testing.assert_close(both[0][:, 0], both[1][:, 0])
    assert not torch.allclose(both[0][:, 1], both[1][:, 1], rtol=1e-3)
    transposed = predictor(symmetries={"transpose": [1, 0]}).double().eval()
    torch.testing.assert_close(transposed.predict(images.mT).flip(1), transposed.predict(images))


def test_a_prediction_is_the_mean_over_all_that_the_symmetries_tell():
    """By hand over the eight symmetries of the square: load case 1 of a mirrored design is unknown."""
    model, x = predictor(symmetries=SYMMETRIES).eval(), torch.rand(4, 1, 8, 8)
    straight = [x, x.flip(-1, -2)], [x.flip(-1), x.flip(-2)]
    first = [model(view)[:, 0] for pair in straight for view in pair]
    second = [model(view)[:, 1] for view in straight[0]]
    # of a transposed design, load case 1 is the first of the design and load case 0 its second
    first += [model(view.mT)[:, 1] for pair in straight for view in pair]
    second += [model(view.mT)[:, 0] for view in straight[0]]
    mean = torch.stack([torch.stack(first).mean(0), torch.stack(second).mean(0)], 1)
    torch.testing.assert_close(model.predict(x), model.denormalise(mean))


def test_a_prediction_does_not_depend_on_the_batch():
    model, images = predictor().eval(), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


def test_it_comes_back_from_disk_with_its_specification_and_weights_rounded_to_half_precision(tmp_path):
    model, images = predictor(), torch.rand(2, 1, 8, 8)
    before = model.predict(images)
    model.save_pretrained(tmp_path)
    assert torch.equal(model.predict(images), before)
    loaded = ResponsePredictor.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.predict(images), model.half().float().predict(images))
    assert loaded.config.spec == SPEC


def test_a_checkpoint_of_the_first_edition_calls_its_specification_meaning(tmp_path):
    model, images = predictor(symmetries=SYMMETRIES).half().float(), torch.rand(2, 1, 8, 8)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["meaning"] = config.pop("spec")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = ResponsePredictor.from_pretrained(tmp_path)
    assert torch.equal(loaded.predict(images), model.predict(images))
    assert loaded.config.spec == SPEC
    assert "meaning" not in loaded.config


def test_it_tells_rows_from_columns_and_places_apart():
    """Of a bar no average over places says where it is."""
    bar = torch.zeros(1, 1, 8, 8)
    bar[..., 1:3, :] = 1
    model = predictor().eval()
    found = model(torch.cat([bar, bar.mT, bar.roll(4, -2)]))
    assert (found[1:] - found[0]).abs().amax((1, 2)).min() > 1e-3


def analytic_responses(designs: Tensor) -> Tensor:
    """Bounds of Reuss, along the columns of a design and along its rows, at three strains."""
    modulus = 1 + 9 * designs
    series = [(1 / (1 / modulus.mean(axis)).mean(1)) for axis in (-1, -2)]
    return torch.stack(series, 1)[..., None] * torch.tensor([0.1, 0.2, 0.3])


def trained_predictions(model, designs, responses, generator) -> torch.Tensor:
    """What a model predicts of the designs after the first 256, which it is trained on."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, wanted = designs[:, None], encoder_of(model).normalise(responses)
    for _ in range(150):
        batch = torch.randint(256, (64,), generator=generator)
        loss = (model(images[batch]) - wanted[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().predict(images[256:]).detach()


def test_it_learns_an_analytic_response():
    generator = torch.Generator().manual_seed(0)
    fraction = torch.rand(320, 1, 1, generator=generator)
    designs = (torch.rand(320, 8, 8, generator=generator) < fraction).float()
    responses = analytic_responses(designs)
    model = predictor(block_out_channels=(8, 8), **response_normalisation(responses[:256]))
    found = trained_predictions(model, designs, responses, generator)
    error = ((found - responses[256:]) / responses[256:]).abs().mean()
    spread = ((responses[:256].mean(0) - responses[256:]) / responses[256:]).abs().mean()
    assert error < 0.1 < spread / 3


def test_it_learns_a_signed_scalar():
    """The difference of the volume fractions of the halves, and one hundredth of it with the other sign."""
    generator = torch.Generator().manual_seed(0)
    fraction = torch.rand(320, 1, 2, generator=generator).repeat_interleave(4, -1)
    designs = (torch.rand(320, 8, 8, generator=generator) < fraction).float()
    difference = designs[:, :, :4].mean((1, 2)) - designs[:, :, 4:].mean((1, 2))
    responses = difference[:, None, None] * torch.tensor([[1.0], [-0.01]])
    spec = {"quantity": "imbalance", "load_cases": ["one", "other"], "strains": [[0.0], [0.0]], "signed": True}
    normalisation = response_normalisation(responses[:256], signed=True)
    model = predictor(block_out_channels=(8, 8), spec=spec, **normalisation)
    found, known = trained_predictions(model, designs, responses, generator), responses[256:]
    error, spread = ((found - known).square().mean(0).sqrt(), known.std(0))
    assert (error < 0.25 * spread).all()
    clear = known.abs() > 0.5 * spread
    assert (clear & (known < 0)).any(0).all()
    assert (found.sign() == known.sign())[clear].all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"spec": None}, "spec"),
        ({"spec": {"strains": []}}, "spec"),
        ({"mean": None}, "scale, mean and std"),
        ({"std": [[1.0] * 2] * 2}, "scale, mean and std"),
        ({"scale": [[0.0] * 3] * 2}, "scale"),
        ({"std": [[0.0] * 3] * 2}, "std"),
        ({"symmetries": {"quarter_turn": [0, 1]}}, "symmetries"),
        ({"symmetries": {"mirror": [0]}}, "symmetries"),
        ({"symmetries": {"mirror": [0, 2]}}, "symmetries"),
    ],
)
def test_a_specification_without_fitting_statistics_is_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name}.* must"):
        predictor(**options)
