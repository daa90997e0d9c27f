"""Every scheduler against densities whose denoiser is exact."""

import inspect
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler, SchedulerMixin

from analytic_denoisers import GaussianMixture, two_moons
from mechdiffusers.schedulers import (
    STOCK_SCHEDULERS,
    PredictorCorrectorScheduler,
    ProbabilityFlowScheduler,
    VDMScheduler,
    stock_scheduler,
)

#: Name: class, options, and timesteps enough for the bias to be small beside the Monte-Carlo error.
OURS = {
    "vdm": (VDMScheduler, {}, 200),
    "flow-euler": (ProbabilityFlowScheduler, {"solver": "euler"}, 200),
    "flow-heun": (ProbabilityFlowScheduler, {"solver": "heun"}, 40),
    "flow-rk4": (ProbabilityFlowScheduler, {"solver": "rk4"}, 20),
    "flow-adams": (ProbabilityFlowScheduler, {"solver": "adams_bashforth"}, 60),
    "flow-churn": (ProbabilityFlowScheduler, {"solver": "heun", "s_churn": 10.0}, 60),
    "pc-ancestral": (PredictorCorrectorScheduler, {"corrector_snr": 0.1}, 120),
    "pc-euler-maruyama": (PredictorCorrectorScheduler, {"predictor": "euler_maruyama", "corrector_snr": 0.1}, 200),
}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
#: Of Runge-Kutta methods.
ORDERS = {"euler": 1, "heun": 2, "rk4": 4}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "score")

GAUSSIAN = GaussianMixture([1.0], [[0.5, -0.3]], [[[0.5, 0.2], [0.2, 0.3]]])
MIXTURE = GaussianMixture(
    [0.2, 0.3, 0.5],
    [[-1.5, 0.0], [1.0, 1.2], [0.8, -1.0]],
    [[[0.09, 0.0], [0.0, 0.04]], [[0.09, 0.0], [0.0, 0.04]], [[0.1, 0.06], [0.06, 0.08]]],
)
DENSITIES = {"gaussian": GAUSSIAN, "mixture": MIXTURE, "moons": two_moons(num_components=12, width=0.1)}


def make(name: str, **options: object) -> tuple[SchedulerMixin, int]:
    """A scheduler of ours in log-SNR spacing, or a stock one, and a number of timesteps."""
    if name in OURS:
        cls, own, num = OURS[name]
        return cls(**{"timestep_spacing": "log_snr", **own, **options}), num
    config = DDPMScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", **options}).config
    return stock_scheduler(name, config), {"ddpm": 500, "heun": 60}.get(name, 120)


def solve(
    scheduler: SchedulerMixin, density: GaussianMixture, x: torch.Tensor, generator: object = None
) -> torch.Tensor:
    """The loop of a stock pipeline with the exact denoiser, on a grid that is already laid."""
    curve = VDMScheduler.from_config(scheduler.config).curve
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        prediction = density.predict(seen, curve(t), scheduler.config.prediction_type)
        x = scheduler.step(prediction, t, x, **({"generator": generator} if takes_generator else {})).prev_sample
    return x


def noise(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_distributed_as(samples: torch.Tensor, density: GaussianMixture, bias: float = 0.0) -> None:
    """Moments, weights and widths agree within 4.5 standard errors (1 in 10^5 a number) and a relative bias."""
    num = len(samples)
    clean = torch.tensor(math.inf)
    truth = density.sample(100_000, torch.Generator().manual_seed(99))
    spread = truth.std(0)
    assert ((samples.mean(0) - density.mean).abs() < 4.5 * spread / math.sqrt(num) + bias * spread).all()
    products = (truth - density.mean)[:, :, None] * (truth - density.mean)[:, None, :]
    tolerance = 4.5 * products.std(0) / math.sqrt(num) + bias * spread[:, None] * spread
    assert ((samples.T.cov() - density.covariance).abs() < tolerance).all()
    shares = density.responsibilities(samples, clean)
    error = 4.5 * density.responsibilities(truth, clean).std(0) / math.sqrt(num)
    assert ((shares.mean(0) - density.weights).abs() < error + bias * density.weights).all()
    # the spread within the components, which is a small part of the covariance
    found, expected = nearest_component(samples, density), nearest_component(truth, density)
    error = 4.5 * expected.std() / math.sqrt(num)
    assert (found.mean() - expected.mean()).abs() < error + 2 * bias * expected.mean()


def nearest_component(samples: torch.Tensor, density: GaussianMixture) -> torch.Tensor:
    """Squared Mahalanobis distance to the component that is nearest by it, shape (B,)."""
    offset = samples[:, None] - density.means
    return torch.einsum("bki,kij,bkj->bk", offset, torch.linalg.inv(density.covariances), offset).min(1).values


@pytest.mark.parametrize("density", ["mixture", "moons"])
@pytest.mark.parametrize("width", [0.0, 0.85, 1.0, 1.15])
def test_what_compares_samples_with_a_density_sees_the_width_of_its_components(density, width):
    density = DENSITIES[density]
    samples = density.sample(4000, torch.Generator().manual_seed(0))
    nearest = density.means[density.responsibilities(samples, torch.tensor(math.inf)).argmax(1)]
    samples = nearest + width * (samples - nearest)
    if width == 1:
        assert_distributed_as(samples, density)
    else:
        with pytest.raises(AssertionError):
            assert_distributed_as(samples, density, bias=0.02)


@pytest.mark.parametrize(
    ("name", "density"),
    [
        *((name, "gaussian") for name in OURS),  # of the stock ones in test_stock
        *((name, "mixture") for name in [*OURS, *STOCK_SCHEDULERS]),
        *(pytest.param(name, "moons", marks=pytest.mark.slow) for name in [*OURS, "ddpm", "dpmsolver++"]),
    ],
)
def test_samples_of_an_exact_denoiser_have_the_densitys_moments_and_weights(name, density):
    scheduler, num = make(name)
    scheduler.set_timesteps(num)
    # enough of them for noise that is 5 % too small to show
    samples = solve(
        scheduler, DENSITIES[density], noise(20_000 if density == "gaussian" else 4000), torch.manual_seed(1)
    )
    assert_distributed_as(samples, DENSITIES[density], bias=0.02)


def half_way(scheduler: SchedulerMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-SNR at the sixth and the seventh of twelve timesteps, laid here."""
    scheduler.set_timesteps(12)
    levels = scheduler.curve(scheduler.timesteps.unique().flip(0).double())
    return levels[5], levels[6]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("cls", "options"), [(VDMScheduler, {}), (PredictorCorrectorScheduler, {})])
def test_an_ancestral_step_draws_from_the_gaussian_of_bayes_rule(cls, options, prediction_type):
    """q(x_s | x_t, x_0) by the precisions of x_s given x_0 and of x_t given x_s."""
    scheduler = cls(prediction_type=prediction_type, timestep_spacing="log_snr", **options)
    later, sooner = half_way(scheduler)
    alpha_t, alpha_s = torch.sigmoid(later).sqrt(), torch.sigmoid(sooner).sqrt()
    of_data, ratio = torch.sigmoid(-sooner), alpha_t / alpha_s
    of_step = torch.sigmoid(-later) - ratio**2 * of_data
    variance = 1 / (1 / of_data + ratio**2 / of_step)
    x, draw = noise(64), torch.randn(64, 2, generator=torch.manual_seed(1), dtype=torch.float64)
    clean = MIXTURE.predict(x, later, "sample")
    expected = variance * (alpha_s * clean / of_data + ratio * x / of_step) + variance.sqrt() * draw
    place = 6 * scheduler.order - 1
    output = MIXTURE.predict(x, later, prediction_type)
    got = scheduler.step(output, scheduler.timesteps[place], x, generator=torch.manual_seed(1)).prev_sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_euler_maruyama_step_is_that_of_the_reverse_equation():
    r"""dx = [-x / 2 - score] dB + dw over the integral B of beta, where log alpha falls by B / 2."""
    scheduler = PredictorCorrectorScheduler(predictor="euler_maruyama", timestep_spacing="log_snr")
    later, sooner = half_way(scheduler)
    beta = torch.nn.functional.logsigmoid(sooner) - torch.nn.functional.logsigmoid(later)
    x, draw = noise(64), torch.randn(64, 2, generator=torch.manual_seed(1), dtype=torch.float64)
    expected = x + (x / 2 + MIXTURE.score(x, later)) * beta + beta.sqrt() * draw
    output = MIXTURE.predict(x, later)
    got = scheduler.step(output, scheduler.timesteps[11], x, generator=torch.manual_seed(1)).prev_sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("corrector_snr", [0.1, 0.3])
def test_the_langevin_corrector_settles_at_its_own_stationary_variance(corrector_snr):
    """On noisy data N(0, S) its step is a linear recursion, with the variance S / (1 - r^2 sigma^2 / S) for ever."""
    scheduler = PredictorCorrectorScheduler(corrector_snr=corrector_snr, timestep_spacing="log_snr")
    log_snr, _ = half_way(scheduler)
    spread = 0.5 * torch.sigmoid(log_snr) + torch.sigmoid(-log_snr)
    exact = spread / (1 - corrector_snr**2 * torch.sigmoid(-log_snr) / spread)
    x, generator = exact.sqrt() * noise(20_000), torch.manual_seed(1)
    for _ in range(100):
        output = torch.sigmoid(-log_snr).sqrt() * x / spread
        x = scheduler.step(output, scheduler.timesteps[10], x, generator=generator).prev_sample
    assert x.var().item() == pytest.approx(exact.item(), rel=4.5 * math.sqrt(2 / x.numel()))


def test_annealed_langevin_dynamics_alone_finds_the_density():
    scheduler = PredictorCorrectorScheduler(
        predictor="none", num_corrector_steps=10, corrector_snr=0.3, timestep_spacing="log_snr"
    )
    scheduler.set_timesteps(80)
    samples = solve(scheduler, MIXTURE, noise(4000), torch.Generator().manual_seed(1))
    assert_distributed_as(samples, MIXTURE, bias=0.08)


@pytest.mark.parametrize("name", OURS)
def test_the_four_prediction_types_take_the_same_steps(name):
    ends = []
    for prediction_type in PREDICTION_TYPES:
        scheduler, _ = make(name, prediction_type=prediction_type)
        scheduler.set_timesteps(12)
        ends.append(solve(scheduler, MIXTURE, noise(64), torch.Generator().manual_seed(1)))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-6)


def assert_the_same_steps(stock: SchedulerMixin, twin: SchedulerMixin, last_too: bool = True) -> None:
    """In double precision, where the stock coefficients lose no digits."""
    torch.testing.assert_close(twin.alphas_cumprod, stock.alphas_cumprod, rtol=0, atol=1e-7)
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    if stock.config.rescale_betas_zero_snr:  # where ours keeps a trace of signal
        stock.alphas_cumprod[-1] = torch.sigmoid(twin.curve(torch.tensor(999)))
    stock.one = stock.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    stock.set_timesteps(20)
    twin.set_timesteps(20)
    assert twin.timesteps.tolist() == stock.timesteps.tolist()
    x = noise(32)
    for i in range(20 if last_too else 19):
        output = MIXTURE.predict(x, twin.curve(twin.timesteps[i]), stock.config.prediction_type)
        expected = stock.step(output, stock.timesteps[i], x, generator=torch.manual_seed(3))
        got = twin.step(output, twin.timesteps[i], x, generator=torch.manual_seed(3))
        torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.pred_original_sample, expected.pred_original_sample, rtol=1e-6, atol=1e-6)
        x = expected.prev_sample


@pytest.mark.parametrize("beta_schedule", [*BETA_SCHEDULES, "zero_snr", "trained"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("stock", "ours"), [(DDPMScheduler, VDMScheduler), (DDIMScheduler, ProbabilityFlowScheduler)])
def test_a_stock_beta_schedule_gives_the_stock_steps(stock, ours, spacing, beta_schedule):
    if stock is DDIMScheduler and beta_schedule in ("sigmoid", "laplace"):
        pytest.skip("DDIMScheduler does not have it")
    if stock is DDIMScheduler and spacing == "linspace":
        pytest.skip("DDIMScheduler steps by T // N, not to the next of these timesteps")
    schedule = {
        "zero_snr": {"rescale_betas_zero_snr": True},
        "trained": {"trained_betas": torch.linspace(0.001, 0.03, 1000).tolist()},
    }.get(beta_schedule, {"beta_schedule": beta_schedule})
    scheduler = stock(clip_sample=False, prediction_type="v_prediction", timestep_spacing=spacing, **schedule)
    euler = {"solver": "euler"} if ours is ProbabilityFlowScheduler else {}
    assert_the_same_steps(scheduler, ours.from_config(scheduler.config, **euler))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ancestral_steps_are_ddpms_with_any_variance_and_clipping(variance_type, clip_sample, prediction_type):
    stock = DDPMScheduler(
        variance_type=variance_type,
        clip_sample=clip_sample,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    twin = VDMScheduler.from_config(stock.config, clip_sample=clip_sample)
    # stock leaves noise in the last sample with the large variance
    assert_the_same_steps(stock, twin, last_too=variance_type != "fixed_large")


@pytest.mark.parametrize("options", [{"beta_schedule": "exp"}, {"trained_betas": [0.02] * 1000}])
def test_a_schedule_that_only_other_stock_schedulers_have_is_theirs_too(options):
    stock = HeunDiscreteScheduler(**options)
    torch.testing.assert_close(VDMScheduler.from_config(stock.config).alphas_cumprod, stock.alphas_cumprod)


def rounding_error(scheduler: SchedulerMixin, dtype: torch.dtype) -> float:
    """Root mean square distance of the samples in a precision from the same in double precision."""
    ends = []
    curve = VDMScheduler.from_config(scheduler.config).curve
    for kind in (torch.float64, dtype):
        scheduler.set_timesteps(20)
        x = noise(256).to(dtype).to(kind)
        for t in scheduler.timesteps:
            output = GAUSSIAN.predict(x.double(), curve(t), "v_prediction").to(dtype).to(kind)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        ends.append(x.double())
    return (ends[0] - ends[1]).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("solver", "factor"), [("euler", 2), ("adams_bashforth", 2), ("heun", 6), ("rk4", 20)])
def test_half_precision_costs_few_more_digits_than_in_ddim(solver, factor, dtype):
    """From no signal at all, where the sample is scaled by thousands, and so is what rounds a stage on its way."""
    stock = DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    ours = ProbabilityFlowScheduler.from_config(stock.config, solver=solver)
    assert rounding_error(ours, dtype) < factor * rounding_error(stock, dtype)


def flow_end(solver: str, log_snr: str, num: int) -> torch.Tensor:
    scheduler = ProbabilityFlowScheduler(
        solver=solver, log_snr=log_snr, timestep_spacing="log_snr", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(num + 1)
    return solve(scheduler, GAUSSIAN, noise(64))


def exact_flow_end(log_snr: str) -> torch.Tensor:
    """Along the flow of a Gaussian each principal coordinate, centred and over its deviation, stays as it is."""
    variances, axes = torch.linalg.eigh(GAUSSIAN.covariance)
    ends = VDMScheduler(log_snr=log_snr).curve(torch.tensor([999.0, 0.0]))
    signal, rest = torch.sigmoid(ends)[:, None], torch.sigmoid(-ends)[:, None]
    means, deviations = signal.sqrt() * GAUSSIAN.mean, (signal * variances + rest).sqrt()
    coordinates = (noise(64) - means[0]) @ axes / deviations[0]
    return means[1] + (coordinates * deviations[1]) @ axes.T


@pytest.mark.parametrize(
    ("solver", "log_snr", "order"),
    [
        *((solver, curve, order) for solver, order in ORDERS.items() for curve in ("betas", "linear")),
        ("adams_bashforth", "betas", 4),
        ("adams_bashforth", "linear", 2),  # that starts at a log-SNR of -5, where the flow is not straight yet
    ],
)
def test_a_solver_converges_at_its_order(solver, log_snr, order):
    reference = exact_flow_end(log_snr)
    counts = torch.tensor([16, 24, 36, 54]) if solver == "rk4" else torch.tensor([64, 96, 144, 216])
    errors = [(flow_end(solver, log_snr, int(num)) - reference).norm(dim=1).mean() for num in counts]
    x, y = counts.double().log(), torch.stack(errors).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert slope.item() == pytest.approx(-order, abs=0.3)


@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_there_and_back_returns_to_the_start_to_the_solvers_order(solver, order):
    start = MIXTURE.sample(64, torch.Generator().manual_seed(0))
    errors = []
    for num in (24, 48) if solver == "rk4" else (100, 200):
        scheduler = ProbabilityFlowScheduler(solver=solver, timestep_spacing="log_snr", final_sigmas_type="sigma_min")
        scheduler.set_timesteps(num + 1, inverse=True)
        assert (scheduler.timesteps.diff() >= 0).all()
        encoded = solve(scheduler, MIXTURE, start)
        scheduler.set_timesteps(num + 1)
        errors.append((solve(scheduler, MIXTURE, encoded) - start).norm(dim=1).median().item())
    assert math.log2(errors[0] / errors[1]) > order - 0.4
    assert errors[1] < 0.1


def test_encoded_data_are_the_noise_that_they_come_from():
    scheduler = ProbabilityFlowScheduler(solver="rk4", timestep_spacing="log_snr")
    scheduler.set_timesteps(60, inverse=True)
    encoded = solve(scheduler, MIXTURE, MIXTURE.sample(4000, torch.Generator().manual_seed(0)))
    assert_distributed_as(encoded, GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]]), bias=0.01)


def log_density_error(solver: str, prediction_type: str, num: int, inverse: bool) -> float:
    """Mean error of the log-density change along the flow of the Gaussian, nats."""
    scheduler = ProbabilityFlowScheduler(
        solver=solver, timestep_spacing="log_snr", prediction_type=prediction_type, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(num + 1, inverse=inverse)
    ends = scheduler.curve(scheduler.timesteps[0]), scheduler.curve(torch.tensor(999.0 if inverse else 0.0))
    x = start = GAUSSIAN.sample(16, torch.Generator().manual_seed(0)) if inverse else noise(16)
    for t in scheduler.timesteps:
        log_snr = scheduler.curve(t)
        derivative = torch.func.vmap(
            torch.func.jacrev(lambda p, log_snr=log_snr: GAUSSIAN.predict(p[None], log_snr, prediction_type)[0])
        )(x)
        divergence = derivative.diagonal(dim1=1, dim2=2).sum(1)
        out = scheduler.step(GAUSSIAN.predict(x, log_snr, prediction_type), t, x, divergence=divergence)
        x = out.prev_sample
    exact = GAUSSIAN.log_prob(x, ends[1]) - GAUSSIAN.log_prob(start, ends[0])
    return (out.log_density_change - exact).abs().mean().item()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_log_density_changes_along_the_flow_as_the_exact_one_does(prediction_type, inverse):
    assert log_density_error("rk4", prediction_type, 60, inverse) < 1e-4


@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_the_log_density_converges_at_the_solvers_order(solver, order):
    counts = (16, 32) if solver == "rk4" else (64, 128)
    coarse, fine = (log_density_error(solver, "epsilon", num, inverse=False) for num in counts)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("num_corrector_steps", [0, 12])
def test_the_corrector_repairs_a_predictor_that_is_wrong(num_corrector_steps):
    scheduler = PredictorCorrectorScheduler(
        timestep_spacing="log_snr", num_corrector_steps=num_corrector_steps, corrector_snr=0.3
    )
    scheduler.set_timesteps(60)
    for i in range(num_corrector_steps, len(scheduler.timesteps), num_corrector_steps + 1):
        scheduler._rows[i] = scheduler._rows[i]._replace(noise_std=0.0)  # a predictor that forgets its noise
    samples = solve(scheduler, MIXTURE, noise(4000), torch.Generator().manual_seed(1))
    if num_corrector_steps:
        assert_distributed_as(samples, MIXTURE, bias=0.08)
    else:
        with pytest.raises(AssertionError):
            assert_distributed_as(samples, MIXTURE, bias=0.08)


def test_the_optimal_variance_makes_few_ancestral_steps_of_a_gaussian_exact():
    variance = 0.09
    density = GaussianMixture([1.0], [[0.2, 0.0]], (variance * torch.eye(2))[None])
    curve = VDMScheduler().curve
    log_snr = curve(torch.linspace(0, 999, 1000))
    # E|x0 - E[x0 | x_t]|^2 = 1 / (1 / variance + SNR), over sigma^2
    errors = (1 / (1 / variance + log_snr.exp())) / torch.sigmoid(-log_snr)
    spreads = {}
    for kind in ("optimal", "fixed_small"):
        scheduler = VDMScheduler(variance_type=kind, velocity_error=errors.tolist(), timestep_spacing="log_snr")
        scheduler.set_timesteps(8)
        spreads[kind] = solve(scheduler, density, noise(4000), torch.Generator().manual_seed(1)).std(0).mean().item()
    # the last step, to clean data, leaves out the variance of x0 at timestep 0, 0.1 % here
    assert spreads["optimal"] == pytest.approx(0.3, abs=4.5 * 0.3 / math.sqrt(2 * 8000) + 0.001)
    assert spreads["fixed_small"] < 0.27


@pytest.mark.parametrize("curve", ["betas", "linear", "cosine", [8.0, 4.0, -3.0, -6.0]])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_elbo_weights_integrate_the_denoising_error_to_the_information(curve, prediction_type):
    r"""Of N(0, s^2) data the diffusion loss is half of log(1 + s^2 SNR) between its ends (Guo, Shamai & Verdu 2005)."""
    variance = 0.25
    scheduler = VDMScheduler(log_snr=curve, prediction_type=prediction_type)
    timesteps = torch.linspace(0, 999, 20_001, dtype=torch.float64)
    timesteps = (timesteps[1:] + timesteps[:-1]) / 2
    log_snr = scheduler.curve(timesteps)
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    of_clean = 1 / (1 / variance + log_snr.exp())
    # the error of each output that belongs to one of the clean sample
    scale = {"epsilon": alpha / sigma, "v_prediction": 1 / sigma, "sample": 1.0, "score": alpha / sigma**2}
    loss = (scheduler.loss_weights(timesteps) * of_clean * scale[prediction_type] ** 2).mean()
    ends = scheduler.curve(torch.tensor([0.0, 999.0])).exp()
    expected = (torch.log1p(variance * ends[0]) - torch.log1p(variance * ends[1])) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_min_snr_weights_are_the_papers():
    timesteps = torch.tensor([0.0, 300.5, 700.0])
    snr = VDMScheduler().curve(timesteps).exp()
    expected = {
        "sample": snr.clamp(max=5),
        "epsilon": snr.clamp(max=5) / snr,
        "v_prediction": snr.clamp(max=5) / (snr + 1),
    }
    for prediction_type, weights in expected.items():
        scheduler = VDMScheduler(prediction_type=prediction_type)
        torch.testing.assert_close(scheduler.loss_weights(timesteps, "min_snr"), weights)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_exact_predictions_are_those_of_the_samples_average(prediction_type):
    """Tweedie's formula: the exact denoiser has the least error of all, and its error is orthogonal to what it sees."""
    log_snr = torch.tensor(0.5)
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    clean, draw = MIXTURE.sample(200_000, torch.Generator().manual_seed(0)), noise(200_000)
    x = alpha * clean + sigma * draw
    target = {
        "epsilon": draw,
        "sample": clean,
        "v_prediction": alpha * draw - sigma * clean,
        "score": -draw / sigma,
    }[prediction_type]
    error = target - MIXTURE.predict(x, log_snr, prediction_type)
    for feature in (torch.ones_like(x), x, x.sin()):
        product = error * feature
        assert (product.mean(0).abs() < 4.5 * product.std(0) / math.sqrt(len(x))).all()
