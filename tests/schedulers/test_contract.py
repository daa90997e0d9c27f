"""What stock pipelines, checkpoints and users ask of a scheduler, whatever it computes."""

import doctest
import importlib
import math
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    SchedulerMixin,
    UNet2DModel,
)

from mechdiffusers.pipelines import LatentDDPMPipeline, record_training_schedule
from mechdiffusers.schedulers import (
    PredictorCorrectorScheduler,
    ProbabilityFlowScheduler,
    VDMScheduler,
    stock_scheduler,
)

CLASSES = (VDMScheduler, ProbabilityFlowScheduler, PredictorCorrectorScheduler)
VARIANTS = [
    (VDMScheduler, {}),
    (VDMScheduler, {"variance_type": "optimal", "velocity_error": [0.5, 0.1]}),
    (ProbabilityFlowScheduler, {"solver": "euler"}),
    (ProbabilityFlowScheduler, {"solver": "heun", "s_churn": 2.0}),
    (ProbabilityFlowScheduler, {"solver": "rk4"}),
    (ProbabilityFlowScheduler, {"solver": "adams_bashforth"}),
    (PredictorCorrectorScheduler, {}),
    (PredictorCorrectorScheduler, {"predictor": "euler_maruyama"}),
    (PredictorCorrectorScheduler, {"predictor": "none", "num_corrector_steps": 2}),
]
VARIANCE_PRESERVING = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)


def run(scheduler: SchedulerMixin, x: torch.Tensor, generator: object = None, num: int = 5) -> torch.Tensor:
    """Some smooth denoiser, and the loop."""
    scheduler.set_timesteps(num, device=x.device)
    for t in scheduler.timesteps:
        output = torch.tanh(scheduler.scale_model_input(x, t)) + t.to(x.dtype) / 1000
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize(
    "name", ["log_snr_curve", "scheduling_vdm", "scheduling_probability_flow", "scheduling_predictor_corrector"]
)
def test_the_examples_of_the_docstrings_are_true(name):
    module = importlib.import_module(f"mechdiffusers.schedulers.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_are_those_of_ddpm_except_that_nothing_clips(cls):
    ours, stock = cls().config, DDPMScheduler().config
    shared = {key for key in ours if key in stock and not key.startswith("_")}
    assert {key for key in shared if ours[key] != stock[key]} == {"clip_sample"}
    assert ours.clip_sample is False
    assert {"beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type"} <= shared


# KDPM2DiscreteScheduler hands single tensors to NumPy, some thousand times
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:numpy")
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_from_config_takes_the_noise_schedule_of_any_stock_scheduler(cls, name, tmp_path):
    for options in ({}, {"beta_schedule": "scaled_linear", "beta_end": 0.012, "prediction_type": "v_prediction"}):
        stock = getattr(diffusers, name)(**options)
        stock.save_pretrained(tmp_path)
        for ours in (cls.from_config(stock.config), cls.from_pretrained(tmp_path)):
            torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod)
            assert ours.config.prediction_type == stock.config.prediction_type
            assert ours.config.clip_sample is False


@pytest.mark.parametrize("cls", CLASSES)
def test_the_way_back_to_a_stock_scheduler_keeps_the_noise_schedule(cls):
    ours = cls(beta_schedule="sigmoid", prediction_type="sample")
    stock = stock_scheduler("dpmsolver++", {**ours.config, "beta_schedule": "scaled_linear"})
    again = cls.from_config(stock.config)
    assert (again.config.beta_schedule, again.config.prediction_type) == ("scaled_linear", "sample")
    assert DDPMScheduler.from_config(ours.config).config.beta_schedule == "sigmoid"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("log_snr", ["linear", "cosine", [9.0, 2.0, -5.5]])
def test_the_stock_idiom_hands_any_curve_on_and_takes_it_back(cls, log_snr, tmp_path):
    ours = cls(log_snr=log_snr, rescale_betas_zero_snr=True)
    ours.save_pretrained(tmp_path)
    for config in (ours.config, cls.from_pretrained(tmp_path).config):
        stock = DDPMScheduler.from_config(config)
        torch.testing.assert_close(stock.alphas_cumprod, ours.alphas_cumprod, rtol=1e-5, atol=1e-6)
        assert stock.config.clip_sample is False
        assert torch.equal(cls.from_config(stock.config).alphas_cumprod, ours.alphas_cumprod)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("options", [{}, {"clip_sample": True}, {"clip_sample": False}])
def test_clipping_is_never_taken_over_from_stock_whether_saved_or_not(cls, options, tmp_path):
    stock = DDPMScheduler(**options)
    stock.save_pretrained(tmp_path)
    for config in (stock.config, DDPMScheduler.from_pretrained(tmp_path).config):
        assert cls.from_config(config).config.clip_sample is False
        clipping = cls.from_config(config, clip_sample=True)
        assert clipping.config.clip_sample is True
        clipping.save_pretrained(tmp_path / "ours")
        for ours in (clipping, cls.from_pretrained(tmp_path / "ours")):
            assert cls.from_config(ours.config).config.clip_sample is True


def test_our_classes_pass_each_others_options_on_in_silence(caplog):
    vdm = VDMScheduler(velocity_error=[0.2, 0.1], variance_type="optimal")
    flow = ProbabilityFlowScheduler.from_config(vdm.config, solver="rk4")
    again = VDMScheduler.from_config(PredictorCorrectorScheduler.from_config(flow.config).config)
    assert not caplog.records
    assert (again.config.variance_type, again.config.velocity_error) == ("optimal", [0.2, 0.1])
    assert ProbabilityFlowScheduler.from_config(again.config).config.solver == "rk4"


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
@pytest.mark.parametrize("log_snr", ["cosine", [9.0, 2.0, -5.5]])
def test_a_saved_scheduler_comes_back_and_steps_alike(cls, options, log_snr, tmp_path):
    scheduler = cls(log_snr=log_snr, timestep_spacing="log_snr", **options)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    x = torch.randn(2, 3, generator=torch.manual_seed(0))
    assert torch.equal(run(scheduler, x, torch.manual_seed(1)), run(loaded, x, torch.manual_seed(1)))


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_a_sample_depends_on_its_own_generator_alone(cls, options):
    x = torch.randn(3, 4, generator=torch.manual_seed(0))
    together = run(cls(**options), x, [torch.Generator().manual_seed(i) for i in range(3)])
    alone = [run(cls(**options), x[i : i + 1], [torch.Generator().manual_seed(i)]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_the_sample_keeps_its_dtype(cls, options, dtype):
    end = run(cls(**options), torch.randn(2, 3, dtype=dtype))
    assert end.dtype == dtype
    assert end.isfinite().all()


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_nothing_in_the_loop_waits_for_a_device(cls, options):
    """On the meta device there are no values: reading one, as a synchronisation does, raises."""
    scheduler = cls(**options)
    assert run(scheduler, torch.empty(2, 3, device="meta")).device.type == "meta"
    with pytest.raises(RuntimeError):  # the test can fail
        float(scheduler.timesteps[0])


@pytest.mark.parametrize(
    ("cls", "options"), [(cls, options) for cls, options in VARIANTS if not options.get("s_churn")]
)
def test_a_loop_may_start_later_as_from_a_noised_image(cls, options):
    """Stock pipelines cut the timesteps so; the rest goes as if there were no more of them."""
    x = torch.randn(2, 3, generator=torch.manual_seed(0))
    grid = [900.5, 600.25, 400.0, 120.0, 30.0, 4.0]
    scheduler = cls(**options)
    scheduler.set_timesteps(timesteps=grid)
    for first in (2, 0, 3):
        timesteps = scheduler.timesteps[first * scheduler.order :]
        generators = torch.manual_seed(1), torch.Generator().manual_seed(1)
        own, other = x, x
        whole = cls(**options)
        whole.set_timesteps(timesteps=grid[first:])
        assert timesteps.tolist() == whole.timesteps.tolist()
        for t, s in zip(timesteps, whole.timesteps, strict=True):
            own = scheduler.step(torch.tanh(own), t, own, generator=generators[0]).prev_sample
            other = whole.step(torch.tanh(other), s, other, generator=generators[1]).prev_sample
        torch.testing.assert_close(own, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_nothing_in_the_loop_waits_for_a_gpu(cls, options):
    scheduler, x = cls(**options), torch.randn(2, 3, device="cuda")
    scheduler.set_timesteps(5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x, generator=torch.Generator("cuda").manual_seed(0)).prev_sample
        with pytest.raises(RuntimeError):  # the test can fail
            float(x.sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_timesteps_may_be_given_as_numbers_too(cls, options):
    x = torch.randn(2, 3, generator=torch.manual_seed(0))
    scheduler = cls(**options)
    expected = run(scheduler, x, torch.manual_seed(1))
    scheduler.set_timesteps(5)
    generator = torch.manual_seed(1)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(torch.tanh(x) + t / 1000, t, x, generator=generator).prev_sample
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_timesteps_that_a_user_replaces_are_told_by_their_values(cls):
    scheduler, x = cls(), torch.randn(2, 3, generator=torch.manual_seed(0))
    scheduler.set_timesteps(5)
    second = scheduler.order  # where the step from the second timestep starts
    expected = scheduler.step(torch.tanh(x), scheduler.timesteps[second], x, generator=torch.manual_seed(1))
    scheduler.set_timesteps(5)
    scheduler.timesteps = scheduler.timesteps[second:].clone()
    got = scheduler.step(torch.tanh(x), scheduler.timesteps[0], x, generator=torch.manual_seed(1))
    torch.testing.assert_close(got.prev_sample, expected.prev_sample)


@pytest.mark.parametrize("cls", CLASSES)
def test_fractional_timesteps_are_noised_between_their_neighbours(cls):
    scheduler, stock = cls(), DDPMScheduler()
    x, noise = torch.randn(2, 4, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    whole = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(
        scheduler.add_noise(x, noise, whole), stock.add_noise(x, noise, whole), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        scheduler.get_velocity(x, noise, whole), stock.get_velocity(x, noise, whole), rtol=0, atol=1e-5
    )
    between = scheduler.curve(torch.tensor([10.25, 999.5]))
    assert between[0] == pytest.approx((0.75 * scheduler.curve(whole) + 0.25 * scheduler.curve(whole + 1))[1])
    assert between[1] < scheduler.curve(whole)[-1]
    assert scheduler.add_noise(x, noise, torch.tensor(10.25)).shape == x.shape


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_a_grid_of_ones_own_is_taken(cls, options):
    scheduler = cls(**options)
    scheduler.set_timesteps(timesteps=[900.5, 300.25, 4.0])
    assert scheduler.num_inference_steps == 3
    if not options.get("s_churn") and options.get("solver") != "rk4":
        assert set(scheduler.timesteps.tolist()) == {900.5, 300.25, 4.0}
    scheduler.set_timesteps(2)
    assert scheduler.num_inference_steps == 2


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "log_snr"])
def test_a_spacing_gives_as_many_timesteps_as_are_asked_for(spacing):
    scheduler = VDMScheduler(timestep_spacing=spacing)
    for num in range(1, 1001):
        scheduler.set_timesteps(num)
        assert len(scheduler.timesteps) == num
        assert (scheduler.timesteps.diff() < 0).all()


def test_no_timestep_comes_twice_where_an_offset_leaves_the_range():
    scheduler = ProbabilityFlowScheduler(solver="adams_bashforth", steps_offset=1)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -1))


def test_a_table_may_be_an_array():
    assert torch.equal(
        VDMScheduler(log_snr=np.array([3.0, -3.0])).alphas_cumprod, VDMScheduler(log_snr=[3.0, -3.0]).alphas_cumprod
    )


def test_optimised_timesteps_stand_in_the_configuration(tmp_path):
    steps = {"3": {"timesteps": [990.0, 400.5, 30.0]}}
    scheduler = ProbabilityFlowScheduler(solver="euler", optimized_steps=steps)
    scheduler.save_pretrained(tmp_path)
    loaded = ProbabilityFlowScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(3)
    assert loaded.timesteps.tolist() == [990.0, 400.5, 30.0]
    loaded.set_timesteps(4)
    assert len(loaded.timesteps) == 4


@pytest.mark.parametrize("cls", CLASSES)
def test_clipping_bounds_the_predicted_sample(cls):
    scheduler = cls(clip_sample=True, clip_sample_range=0.5)
    scheduler.set_timesteps(3)
    out = scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.full((1, 2), 3.0))
    assert out.pred_original_sample.abs().max() == 0.5


@pytest.fixture
def pixel_pipeline() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
    )
    pipe = DDPMPipeline(unet.eval(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_the_stock_pixel_pipeline_runs_them(pixel_pipeline, cls, options):
    pixel_pipeline.scheduler = cls.from_config(pixel_pipeline.scheduler.config, clip_sample=True, **options)
    first, second = (
        pixel_pipeline(2, num_inference_steps=3, output_type="np", generator=torch.manual_seed(0)).images
        for _ in range(2)
    )
    assert first.shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("clip_sample", [True, False])
def test_the_stock_pixel_pipeline_gives_the_images_of_ddpm_with_ours(pixel_pipeline, clip_sample):
    images = []
    for cls in (DDPMScheduler, VDMScheduler):
        config = pixel_pipeline.scheduler.config
        pixel_pipeline.scheduler = cls.from_config(config, clip_sample=clip_sample)
        run = pixel_pipeline(2, num_inference_steps=10, output_type="np", generator=torch.manual_seed(0))
        images.append(run.images)
    np.testing.assert_allclose(*images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_the_stock_transformer_pipeline_runs_them(cls, options):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=4)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), cls(**options))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[1, 2], num_inference_steps=3, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 4, 4, 3)
    assert np.isfinite(images).all()


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_our_pipeline_runs_them_and_an_image_depends_on_its_generator_alone(make_pipeline, cls, options):
    pipe = make_pipeline(decoder_likelihood="discretized_logistic", decoder_scale=1e-3)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)

    def images(seeds: range) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(batch_size=len(generators), num_inference_steps=3, generator=generators, output_type="pt").images

    torch.testing.assert_close(images(range(3))[1:2], images(range(1, 2)), rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_checkpoint_ships_the_scheduler_and_the_installed_class_loads_it(make_pipeline, cls, tmp_path):
    pipe = make_pipeline()
    pipe.scheduler = cls.from_config(pipe.scheduler.config, log_snr="cosine")
    record_training_schedule(pipe.unet, pipe.scheduler)
    again = LatentDDPMPipeline(pipe.vae, pipe.unet, pipe.scheduler, pipe.response_encoder)
    again.save_pretrained(tmp_path)
    stems = {cls.__module__.split(".")[-1], "log_snr_curve", "variance_preserving_scheduler"}
    stems |= {"probability_flow_tableaux"} if cls is ProbabilityFlowScheduler else set()
    shipped = {path.name for path in (tmp_path / "scheduler").iterdir()}
    assert shipped == {"scheduler_config.json", *(f"{stem}.py" for stem in stems)}
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is cls
    assert loaded.scheduler.config.log_snr == "cosine"


def test_another_curve_than_the_denoisers_is_refused(make_pipeline):
    pipe = make_pipeline()
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, log_snr="linear")
    with pytest.raises(ValueError, match="^scheduler must have the noise schedule"):
        pipe(num_inference_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "magic"}, "beta_schedule must be one that diffusers has, such as 'linear', got 'magic'"),
        ({"log_snr": "magic"}, "log_snr must be one of ('betas', 'linear', 'cosine') or a table, got 'magic'"),
        ({"log_snr": [3.0, 3.0, -1.0]}, "log_snr must be at least two finite numbers that fall strictly"),
        ({"log_snr": [3.0, math.nan]}, "log_snr must be at least two finite numbers"),
        ({"log_snr": [3.0]}, "log_snr must be at least two finite numbers"),
        ({"log_snr": "linear", "log_snr_range": (-5.0, 5.0)}, "log_snr_range must be the log-SNR at data and a lower"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be 1000 numbers, got 2"),
        ({"prediction_type": "flow"}, "prediction_type must be one of ('epsilon', 'v_prediction', 'sample', 'score')"),
        ({"timestep_spacing": "random"}, "timestep_spacing must be one of ('leading', "),
        ({"num_train_timesteps": 1}, "num_train_timesteps must be an integer of at least 2, got 1"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_curves_are_named(cls, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        cls(**options)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (VDMScheduler, {"variance_type": "learned"}, "variance_type must be one of .* got 'learned'"),
        (VDMScheduler, {"variance_type": "optimal"}, "velocity_error must be given for variance_type='optimal'"),
        (VDMScheduler, {"velocity_error": [0.1, -0.1]}, "velocity_error must be at least two non-negative numbers"),
        (ProbabilityFlowScheduler, {"solver": "rk45"}, r"solver must be one of \('euler', 'heun', 'rk4'"),
        (ProbabilityFlowScheduler, {"final_sigmas_type": "one"}, "final_sigmas_type must be one of"),
        (ProbabilityFlowScheduler, {"s_churn": -1.0}, "s_churn must be a non-negative number, got -1.0"),
        (ProbabilityFlowScheduler, {"s_churn": 1.0, "solver": "adams_bashforth"}, "s_churn must be 0 with solver='ad"),
        (ProbabilityFlowScheduler, {"optimized_steps": {"2": {"timesteps": [3.0]}}}, "optimized_steps must have 2 "),
        (
            ProbabilityFlowScheduler,
            {"optimized_steps": {"2": {"timesteps": [3.0, 4.0]}}},
            "timesteps must fall strictly",
        ),
        (
            ProbabilityFlowScheduler,
            {"optimized_steps": {"1": {"timesteps": [3.0], "weights": [[1.0]]}}, "solver": "euler"},
            "optimized_steps must have 1 timesteps under '1' and, for 'adams_bashforth' alone, as many rows",
        ),
        (PredictorCorrectorScheduler, {"predictor": "magic"}, "predictor must be one of"),
        *((cls, {"clip_sample_range": -1.0}, "clip_sample_range must be positive, got -1.0") for cls in CLASSES),
        *((cls, {"clip_sample_range": None}, "clip_sample_range must be positive, got None") for cls in CLASSES),
        (PredictorCorrectorScheduler, {"num_corrector_steps": -1}, "num_corrector_steps must be an integer of at le"),
        (PredictorCorrectorScheduler, {"predictor": "none", "num_corrector_steps": 0}, "num_corrector_steps must be"),
        (PredictorCorrectorScheduler, {"corrector_snr": 1.0}, r"corrector_snr must lie inside \(0, 1\)"),
    ],
)
def test_bad_options_are_named(cls, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        cls(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_inference_steps or timesteps must be given, not both"),
        ({"num_inference_steps": 2, "timesteps": [3.0, 2.0]}, "num_inference_steps or timesteps must be given"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"num_inference_steps": 2.0}, "num_inference_steps must be an integer"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be at most 1000 in 'leading' spacing, got 1001"),
        ({"timesteps": [3.0, 4.0]}, r"timesteps must fall strictly and lie in \[0, 1000\), got \[3.0, 4.0\]"),
        ({"timesteps": [1000.0, 4.0]}, "timesteps must fall strictly"),
        ({"timesteps": [4.0, -1.0]}, "timesteps must fall strictly"),
        ({"timesteps": [4.0, math.nan]}, "timesteps must fall strictly"),
        ({"timesteps": []}, "timesteps must fall strictly"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_grids_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        cls().set_timesteps(**arguments)


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_steps_are_named(cls):
    scheduler, x = cls(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="^set_timesteps must be called before step"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"^timestep must be one of those of set_timesteps, .* got 123"):
        scheduler.step(x, 123, x)
    with pytest.raises(ValueError, match=r"^model_output must have the sample's shape \(2, 3\), got \(2, 6\)"):
        scheduler.step(torch.zeros(2, 6), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"^timesteps must lie in \[0, 1000\), got \[3.0, 1000.0\]"):
        scheduler.add_noise(x, x, torch.tensor([3.0, 1000.0]))
    with pytest.raises(ValueError, match="^timesteps must be one or 2, one a sample"):
        scheduler.add_noise(x, x, torch.tensor([3.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match="^noise must have the samples' shape"):
        scheduler.add_noise(x, x[:1], torch.tensor(3.0))


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize(
    "scheduler", [VDMScheduler(), PredictorCorrectorScheduler(), ProbabilityFlowScheduler(s_churn=5.0)]
)
def test_as_many_generators_as_samples_are_needed(scheduler, num):
    generators = [torch.Generator().manual_seed(seed) for seed in range(num)]
    with pytest.raises(ValueError, match=f"^generator must be one or a list of 2, one a sample, got {num}"):
        run(scheduler, torch.zeros(2, 3), generators)


def test_an_error_of_the_velocity_may_be_a_tensor(tmp_path):
    error = torch.tensor([0.25, 0.5], requires_grad=True)
    VDMScheduler(variance_type="optimal", velocity_error=error).save_pretrained(tmp_path)
    assert VDMScheduler.from_pretrained(tmp_path).config.velocity_error == [0.25, 0.5]


def test_stages_out_of_order_are_refused():
    scheduler, x = ProbabilityFlowScheduler(solver="rk4"), torch.zeros(2, 3)
    scheduler.set_timesteps(4)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="^timestep must follow the order of set_timesteps, got .* out of order"):
        scheduler.step(x, scheduler.timesteps[2], x)


def test_a_grid_without_a_step_is_refused():
    with pytest.raises(
        ValueError, match=r"^timesteps must leave a step to go before the trajectory's end, got \[0.0\]"
    ):
        ProbabilityFlowScheduler(final_sigmas_type="sigma_min").set_timesteps(timesteps=[0.0])


def test_divergences_that_cannot_give_a_density_are_refused():
    x, divergence = torch.zeros(2, 3), torch.zeros(2)
    for options in ({"clip_sample": True}, {"s_churn": 1.0}, {"final_sigmas_type": "zero"}):
        scheduler = ProbabilityFlowScheduler(**{"final_sigmas_type": "sigma_min", "solver": "euler", **options})
        scheduler.set_timesteps(timesteps=[500.0])
        with pytest.raises(ValueError, match="^divergence must be left out with clipping, churn or a step to clean"):
            scheduler.step(x, scheduler.timesteps[0], x, divergence=divergence)
    scheduler = ProbabilityFlowScheduler(final_sigmas_type="sigma_min")
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"^divergence must have shape \(2,\)"):
        scheduler.step(x, scheduler.timesteps[0], x, divergence=torch.zeros(2, 1))
    scheduler.step(x, scheduler.timesteps[0], x, divergence=divergence)
    with pytest.raises(ValueError, match=r"^divergence must have shape .* at every evaluation or none, got None"):
        scheduler.step(x, scheduler.timesteps[1], x)


def test_unknown_weightings_are_named():
    with pytest.raises(ValueError, match="^weighting must be one of .* got 'magic'"):
        VDMScheduler().loss_weights(torch.tensor([3.0]), "magic")
