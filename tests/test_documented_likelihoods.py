"""The likelihoods on the page and in the card are those that the benchmarks recorded, and the page's code runs."""

import re

import pytest

from documents import ROOT, recorded, with_error, words
from mechdiffusers import likelihood

PAGE, CARD = "docs/likelihood.md", "model_cards/composites-32.md"


def figures(name: str) -> dict:
    return recorded(f"likelihood_{name}")


@pytest.mark.parametrize("page", [PAGE, CARD])
def test_the_table_of_models_is_what_was_measured(page):
    value, flow, text = figures("value"), figures("flow"), words(page)
    rows = [value[name] for name in value if isinstance(value[name], dict) and "nats" in value[name]]
    assert len(rows) == 4
    for row in (*rows, flow):
        nats = with_error(row["nats"], row["nats_standard_error"], 0)
        bits = with_error(row["bits_per_dim"], row["bits_per_dim_standard_error"], 3)
        assert f"| {row.get('num', value['num'])} | {nats} | {bits} |" in text
    more = flow["less_continuous_bound_nats"]
    assert f"{with_error(more['mean'], more['standard_error'], 0)} nats above" in text
    assert f"{flow['error_nats_per_latent_dim']['both']['largest']:.4f} nats a latent" in text
    assert f"{flow['num_steps']} steps, {flow['num_probes']} probes" in text


def test_the_table_of_strange_designs_is_what_was_measured():
    scores = ("low_likelihood", "atypical_likelihood", "two_point_distance", "interface_length")
    for name, family in figures("out_of_distribution")["families"].items():
        areas = [family[score]["area"] for score in scores]
        assert f"| {name} | " + " | ".join(f"{x:.2f}" for x in (family["bits_per_dim"], *areas)) + " |" in words(PAGE)


def test_the_weights_before_told_strange_designs_neither_better_nor_worse():
    now, before = figures("out_of_distribution"), figures("out_of_distribution_before")
    assert now["noise_levels_a_design"] == before["noise_levels_a_design"]
    for score in ("low_likelihood", "atypical_likelihood"):
        areas = [[kind[score]["area"] for kind in found["families"].values()] for found in (now, before)]
        assert max(abs(one - other) for one, other in zip(*areas, strict=True)) < 0.025
    assert "over nine families the areas under the curve differ by at most 0.02," in words(CARD)
    bits = [f"{found['heldout_bits_per_dim']:.2f}" for found in (before, now)]
    assert "{} bits a pixel where these have {}.".format(*bits) in words(CARD)


def test_the_mean_over_many_designs_and_what_it_took_are_what_was_measured():
    mean, text = figures("mean"), words(PAGE)
    assert f"{with_error(mean['nats'], mean['nats_standard_error'], 1)} nats" in text
    assert f"{mean['standard_error_nats_per_latent_dim']:.4f} nats a latent" in text
    assert f"{mean['minutes']:.1f} minutes" in text
    early = mean["peak_memory_mebibytes_after_a_tenth"]
    assert f"{mean['peak_memory_mebibytes']:.0f} MiB at its peak, and {early:.0f} MiB after a tenth" in text
    assert f"{figures('flow')['peak_memory_mebibytes']:.0f} MiB" in text


def test_the_cost_of_a_value_is_what_was_measured():
    cost, text = figures("cost"), words(PAGE)
    for label, name in {
        "4 steps": "ours_4_steps",
        "8 steps": "ours_8_steps",
        "adaptive, 1e-3": "ours_adaptive_1e-3",
        "RK45 of scipy at 1e-5, in the log-SNR": "rk45_1e-5",
    }.items():
        row = cost[name]
        error = row["largest_error_nats_per_latent_dim"]
        assert f"| {label} | {row['evaluations_with_error_estimate']} | {error:.4f} |" in text


def test_monais_error_and_ours_are_what_was_measured():
    monai, text = figures("monai"), words(PAGE)
    for name, digits in {
        "monai_get_likelihood": 1,
        "ours_1000_step_chain_bound": 3,
        "ours_continuous_bound": 3,
        "ours_probability_flow": 4,
    }.items():
        row = monai[name]
        assert f"| {with_error(row['mean_error_nats_per_dim'], row['standard_error'], digits)} |" in text.replace(
            "+", ""
        )


@pytest.mark.slow
def test_the_code_of_the_page_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / PAGE).read_text(), re.S))
    names: dict = {"__name__": "likelihood"}
    exec(compile(code, PAGE, "exec"), names)
    assert names["output"].is_lower_bound
    assert ((names["chain"].effective_sample_size >= 1) & (names["chain"].effective_sample_size <= 8)).all()
    # the flow in 16 steps there and 16 back
    assert (names["again"] - names["latents"]).abs().max() < 0.02
    assert names["images"].shape == (8, 1, 32, 32)


def test_the_table_of_priors_has_each_prior_and_all_of_its_options():
    page = (ROOT / PAGE).read_text()
    priors = {name: getattr(likelihood, name) for name in likelihood.__all__ if name.endswith("Prior")}
    for name, prior in priors.items():
        (row,) = re.findall(rf"^\| `{name}`.*$", page, re.M)
        for option, value in vars(prior()).items():
            assert f"`{option}={value}`" in row


def test_the_table_of_interpolation_is_what_was_measured():
    found = recorded("interpolation")
    for name in ("designs", "straight", "spherical", "by_way_of_noise"):
        density, bits = (
            with_error(found[name][key]["mean"], found[name][key]["standard_error"], digits)
            for key, digits in (("interface_density", 3), ("bits_a_pixel", 2))
        )
        assert f"| {density} | {bits} |" in words(PAGE)
    assert f"{found['pairs']} held-out pairs" in words(PAGE)
