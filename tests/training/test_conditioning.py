"""From the responses of a dataset to a denoiser that follows them."""

import json
import math
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest

from mechdiffusers.mechanics import ResponseSpec, simulate
from mechdiffusers.mechanics.load_cases import LOAD_CASES
from mechdiffusers.microstructures import dataset_from_responses, random_composites
from mechdiffusers.microstructures.build_dataset.columns import dataset_of, grey_levels
from mechdiffusers.microstructures.dataset_folder import write_dataset_folder
from mechdiffusers.models import ResponseEncoder
from mechdiffusers.models.response_predictor import SYMMETRIES
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.training.conditioning import mask_responses
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.denoiser import draw_latents
from mechdiffusers.training.publish import model_card
from mechdiffusers.training.randomness import StepRandomness
from mechdiffusers.training.stages import check_stages, run_stages
from mechdiffusers.training.train import train
from small_runs import SPEC, assert_same_weights, conditional, responses_of, small, write_dataset

DESIGNS = random_composites(64, size=8)[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "composites")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trained"
    train(small(folder, **conditional(dataset)))
    return folder


def load(dataset, **settings):
    return load_designs(small("unused", **{**conditional(dataset), **settings}))


def is_probable(count: int, num: int, probability: float) -> bool:
    """Within what a binomial distribution leaves in all but one of 10,000 cases."""
    return binomtest(count, num, probability).pvalue > 1e-4


def test_a_folder_of_splits_gives_designs_with_responses_and_its_own_heldout_ones(dataset):
    designs = load(dataset)
    assert designs.spec == SPEC
    assert designs.num_train == 48
    np.testing.assert_array_equal(designs.heldout[:, 0] / 255, DESIGNS[:16])
    np.testing.assert_array_equal(designs.heldout_response, responses_of(DESIGNS[:16]))
    images, responses = (torch.stack(part) for part in zip(*designs.train, strict=True))
    np.testing.assert_array_equal(images[:, 0] / 255, DESIGNS[16:])
    np.testing.assert_array_equal(responses, responses_of(DESIGNS[16:]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", [{"strains": [[0.4, 0.5, 0.6]] * 2}, {"solver": {"young_stiff": 1000.0}}])
def test_a_heldout_split_whose_responses_have_another_specification_is_refused(tmp_path, other, streaming):
    folder = write_dataset(tmp_path / "d")
    spec = replace(SPEC, **other)
    dataset_of(grey_levels(DESIGNS[:16]), responses_of(DESIGNS[:16]), {}, spec).to_parquet(folder / "heldout.parquet")
    with pytest.raises(
        ValueError, match=f"^all responses must have one specification, got heldout of .* with {next(iter(other))}"
    ):
        load(folder, streaming=streaming, num_train_designs=48)
    assert load(folder / "heldout.parquet", num_heldout_designs=4).spec == spec


def test_a_design_keeps_its_response_when_the_split_is_drawn_and_on_a_stream(dataset):
    of_image = {
        design.astype(np.uint8).tobytes(): response
        for design, response in zip(DESIGNS[16:], responses_of(DESIGNS[16:]), strict=True)
    }
    drawn = load(dataset / "train.parquet")
    streamed = load(dataset, streaming=True, num_train_designs=20)
    assert (drawn.num_train, len(drawn.heldout)) == (32, 16)
    np.testing.assert_array_equal(streamed.heldout[:, 0] / 255, DESIGNS[:16])
    pairs = [*drawn.train, *zip(drawn.heldout, drawn.heldout_response, strict=True), *islice(streamed.train, 40)]
    for image, response in pairs:
        np.testing.assert_array_equal(response, of_image[(image[0] // 255).numpy().tobytes()])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("never_known", [(1,), (1, 2)], ids=["load case", "strain"])
def test_what_no_training_design_knows_is_refused_before_anything_is_trained(tmp_path, never_known, streaming):
    folder = write_dataset(tmp_path / "d")  # whose held-out designs know all of it
    response = responses_of(DESIGNS[16:])
    response[:, *never_known] = math.nan
    dataset_of(grey_levels(DESIGNS[16:]), response, {}, SPEC).to_parquet(folder / "train.parquet")
    settings = {**conditional(folder), "streaming": streaming, "num_train_designs": 48}
    strain = 0.1 if never_known == (1,) else 0.3
    with pytest.raises(
        ValueError, match=f"^responses must be known .* got only NaN for load case 'shear' at strain {strain}"
    ):
        train(small(tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_entry_that_one_training_design_knows_is_enough(tmp_path):
    folder = write_dataset(tmp_path / "d")
    response = responses_of(DESIGNS[16:])
    response[:-2, 1] = math.nan
    dataset_of(grey_levels(DESIGNS[16:]), response, {}, SPEC).to_parquet(folder / "train.parquet")
    config = small(tmp_path, **conditional(folder))
    check_stages(config, load_designs(config))


def test_without_a_column_of_responses_there_are_none(dataset):
    designs = load(dataset, response_column=None)
    assert designs.spec is None
    assert designs.heldout_response.shape == (16, 0, 0)
    assert next(iter(designs.train))[1].shape == (0, 0)


def test_the_column_of_responses_may_have_another_name(tmp_path):
    designs = load(write_dataset(tmp_path / "d", column="stress"), response_column="stress")
    np.testing.assert_array_equal(designs.heldout_response, responses_of(DESIGNS[:16]))
    with pytest.raises(ValueError, match=r"^response_column must be one of \[.*'stress'.*\] of .*, got 'response'"):
        load(tmp_path / "d")


def test_responses_that_lost_their_specification_are_refused(dataset, tmp_path):
    rows = datasets.load_dataset("parquet", data_files=str(dataset / "train.parquet"), split="train")
    rows = rows.cast_column("response", datasets.Array2D((2, 3), "float32"))
    rows.to_parquet(tmp_path / "lost.parquet")
    with pytest.raises(ValueError, match="^response_column must hold responses with their spec"):
        load(tmp_path / "lost.parquet")


def test_a_heldout_split_that_is_too_small_is_refused(dataset):
    with pytest.raises(ValueError, match="^dataset must have num_heldout_designs=17 designs to hold out, got 16"):
        load(dataset, num_heldout_designs=17)
    with pytest.raises(ValueError, match="^dataset must have at least 49 designs .* got 48"):
        load(dataset, num_train_designs=49)


def opened(num: int, dropout: float, masking: float, known: torch.Tensor | None = None) -> torch.Tensor:
    response = torch.ones(num, 3, 4) if known is None else torch.where(known, 1.0, math.nan).expand(num, 3, 4)
    return mask_responses(response, StepRandomness(("test",)), dropout, masking)


def test_nothing_is_left_open_unless_it_is_asked_for():
    response = torch.randn(100, 3, 4)
    assert torch.equal(mask_responses(response, StepRandomness(("test",)), 0.0, 0.0), response)


def test_as_many_responses_are_left_out_as_wanted_whatever_is_masked():
    for masking in (0.0, 1.0):
        null = opened(4000, 0.2, masking).isnan().flatten(1).all(1)
        assert is_probable(int(null.sum()), 4000, 0.2)


def test_a_mask_leaves_open_load_cases_or_single_strains_but_never_everything():
    is_open = opened(4000, 0.0, 0.4).isnan()
    masked = is_open.flatten(1).any(1)
    assert not is_open.flatten(1).all(1).any()
    # nothing is open where all lots are below a half
    whole_cases = (is_open.all(2) | ~is_open.any(2)).all(1)
    by_case, by_entry = masked & whole_cases, masked & ~whole_cases
    assert is_probable(int(by_case.sum()), 4000, 0.4 * 0.5 * (1 - 1 / 8) + 0.4 * 0.5 * _cases_by_entries())
    assert is_probable(int((by_case | by_entry).sum()), 4000, 0.4 * 0.5 * (2 - 1 / 8 - 1 / 2**12))
    assert is_probable(int(is_open[by_entry][:, 1, 2].sum()), int(by_entry.sum()), 0.5)


def _cases_by_entries() -> float:
    """Probability that twelve single lots of a half open whole load cases alone, one at least."""
    return 6 / 2**12  # three single cases, three pairs; all three at once would open everything, but one entry is kept


def test_a_mask_keeps_something_of_what_is_known():
    known = torch.zeros(3, 4, dtype=torch.bool)
    known[1, :2] = True
    result = opened(1000, 0.0, 1.0, known)
    assert result[:, ~known].isnan().all()
    assert (~result.isnan()).flatten(1).any(1).all()
    assert result[:, known].isnan().any()


def test_two_processes_leave_open_what_one_leaves_open():
    response = torch.randn(6, 3, 4)
    together = mask_responses(response, StepRandomness((0, "denoiser", 7)), 0.3, 0.5)
    halves = [
        mask_responses(half, StepRandomness((0, "denoiser", 7), rank, 2), 0.3, 0.5)
        for rank, half in enumerate(response.split(3))
    ]
    assert torch.equal(torch.cat(halves).nan_to_num(9), together.nan_to_num(9))
    other = mask_responses(response, StepRandomness((0, "denoiser", 8)), 0.3, 0.5)
    assert not torch.equal(other.isnan(), together.isnan())


@pytest.mark.parametrize("load_case", sorted(LOAD_CASES))
def test_a_design_and_its_half_turn_respond_alike(load_case):
    """Under every load case that there is: the edge that moved stands still and the other moves, the other way."""
    designs = torch.from_numpy(DESIGNS[:3].astype(np.float64))
    both = torch.cat([designs, SYMMETRIES["half_turn"](designs)])
    first, second = simulate(both, (load_case,), [0.1, 0.2], element_order=1).stress.chunk(2)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=0)


def test_a_latent_is_drawn_from_either_view_as_often_and_never_from_a_mixture():
    means = torch.stack([torch.zeros(2000, 1, 2, 2), torch.ones(2000, 1, 2, 2)], dim=1)
    moments = torch.cat([means, torch.full_like(means, -100.0)], dim=2)
    latents = draw_latents(moments, 0.0, 1.0, StepRandomness(("test",)))
    latents = latents.round(decimals=6)  # a posterior of no width
    assert set(latents.unique().tolist()) == {0.0, 1.0}
    assert (latents == latents[:, :, :1, :1]).all()
    assert is_probable(int(latents[:, 0, 0, 0].sum()), 2000, 0.5)


def test_a_conditional_run_leaves_a_pipeline_that_knows_what_its_responses_mean(trained):
    pipe = LatentDDPMPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.response_encoder.config.spec == SPEC.to_dict()
    target = torch.from_numpy(responses_of(DESIGNS[1:3]))
    target[0, 1] = math.nan
    images = pipe(response=target, num_images_per_response=2, num_inference_steps=2, guidance_scale=2.0).images
    assert len(images) == 4
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["denoiser/loss"] != metrics["denoiser/loss_without_response"]


def test_heldout_designs_may_have_no_response(dataset, tmp_path):
    config = small(tmp_path, **conditional(dataset))
    designs = load_designs(config)
    unknown = torch.full_like(designs.heldout_response, math.nan)
    run_stages(config, replace(designs, heldout_response=unknown))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["denoiser/loss"] == metrics["denoiser/loss_without_response"]
    assert "predictor/response_error" not in metrics
    assert all(map(math.isfinite, metrics.values()))  # a card refuses others


def test_the_encoder_is_trained_and_averaged_with_the_denoiser(trained):
    torch.manual_seed(0)
    pipe = LatentDDPMPipeline.from_pretrained(trained / "pipeline")
    checkpoint = trained / "checkpoints" / "denoiser-00000006" / "model.safetensors"
    last = {
        key.removeprefix("response_encoder."): value
        for key, value in load_file(checkpoint).items()
        if key.startswith("response_encoder.")
    }
    averaged = pipe.response_encoder.state_dict()
    assert last.keys() == averaged.keys()
    assert not any(torch.equal(last[key], averaged[key]) for key in last)
    assert averaged.keys() == ResponseEncoder(**_options(pipe.response_encoder)).state_dict().keys()


def _options(encoder: ResponseEncoder) -> dict:
    return {key: encoder.config[key] for key in ("token_dim", "spec", "scale", "mean", "std")}


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_an_interrupted_conditional_run_ends_as_if_it_had_not_been(trained, dataset, tmp_path, stage):
    start = str(trained / "checkpoints" / f"{stage}-00000004")
    train(small(tmp_path / "fork", resume_from_checkpoint=start, **conditional(dataset)))
    assert_same_weights(tmp_path / "fork", trained)


def test_a_run_from_an_autoencoders_checkpoint_may_be_conditioned_otherwise(trained, dataset, tmp_path):
    start = str(trained / "checkpoints" / "autoencoder-00000006")
    settings = {**conditional(dataset), "response_column": None}
    pipe = train(small(tmp_path / "fork", resume_from_checkpoint=start, **settings))
    assert pipe.response_encoder.config.spec is None


def test_the_card_says_what_the_responses_mean(trained):
    text = str(model_card(trained, "mechanic/composites"))
    assert "stress, in: modulus of the soft phase" in text
    assert "| `shear` | 0.1, 0.2, 0.3 |" in text
    assert "shape\n(B, 2, 3)" in text


def test_signed_responses_without_a_curve_go_through_all_stages(tmp_path):
    """Entries about zero, one of them zero for all designs, as symmetric stiffness tensors have."""
    designs = random_composites(64, size=8)[0].astype(float)
    coupling = designs[:, :4].mean((1, 2)) - designs[:, 4:].mean((1, 2))
    response = np.stack([designs.mean((1, 2)), coupling, 0 * coupling], 1)[..., None]
    assert (coupling < 0).any()
    spec = ResponseSpec("stiffness", ["C11", "C16", "C26"], [[0.0]] * 3, units="GPa", signed=True)
    dataset = dataset_from_responses(designs, response, spec)
    splits = {"train": dataset.select(range(48)), "heldout": dataset.select(range(48, 64))}
    write_dataset_folder(tmp_path / "data", splits)
    settings = {**conditional(tmp_path / "data"), "random_half_turn": False, "random_reflections": False}
    pipe = train(small(tmp_path / "run", **settings))
    assert ResponseSpec.of(pipe) == spec
    loaded = type(pipe).from_pretrained(tmp_path / "run" / "pipeline")
    wanted = torch.tensor([[[0.5], [-0.2], [0.0]], [[0.3], [0.0], [math.nan]]])
    images = loaded(wanted, num_inference_steps=2, num_candidates=2, num_refinements=1, output_type="np").images
    assert np.isfinite(images).all()
    assert loaded.predict_response(images).shape == (2, 3, 1)
    card = (tmp_path / "run" / "metrics.json").read_text()
    assert np.isfinite(json.loads(card)["predictor/response_error"])
