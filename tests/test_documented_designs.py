"""The errors of designs on the pages and in the cards are those that the benchmarks recorded."""

import numpy as np
import pytest

from documents import recorded, with_error, words

README, PAGE = "README.md", "docs/inverse_design.md"
COMPOSITES, DIGITS = "model_cards/composites-32.md", "model_cards/mechanical-mnist.md"


def percent(figure: dict, digits: int = 1) -> str:
    return with_error(figure["mean"], figure["standard_error"], digits) + " %"


def over_targets(percents: np.ndarray) -> str:
    return with_error(percents.mean(), percents.std(ddof=1) / np.sqrt(len(percents)), 2)


@pytest.mark.parametrize("page", [README, PAGE, COMPOSITES])
def test_the_table_of_eight_designs_is_what_was_measured(page):
    figures, text = recorded("inverse_design"), words(page)
    designs = figures["designs"]
    assert f"{designs['targets']} held-out targets" in text
    seconds = figures["from_target_to_verified"]["seconds"]
    assert f"eight verified designs it takes {seconds:.1f} seconds on two cores" in text
    for name in ("designs", "retrieval"):
        assert f"| {percent(figures[name]['single_percent'])} | {percent(figures[name]['best_percent'])} |" in text
    if page != README:
        assert f"| {percent(figures['autoencoder']['error_percent'], 2)} |" in text
        simulated = designs["targets"] * designs["designs_a_target"]
        assert f"{designs['unsolved']} of the {simulated:,}" in text
        for name in ("designs", "heldout_designs"):
            nats = figures["log_likelihood"][name]["unconditional"]
            assert with_error(nats["mean_nats"], nats["standard_error"], 0) in text


@pytest.mark.parametrize("page", [README, PAGE, COMPOSITES])
def test_the_error_of_refined_designs_is_what_was_measured(page):
    figures, text = recorded("refined_designs"), words(page)
    assert percent(figures["best_percent"][-1], 2) in text
    assert f"{figures['targets']} held-out targets" in text or f"{figures['targets']} targets" in text
    assert f"{figures['designs_a_target']} {'plain draws' if page == PAGE else 'designs'}" in text
    if page == README:
        assert f"{sum(figures['seconds_a_target'].values()):.0f} seconds a target on one core" in text
    else:
        assert percent(figures["nearest_training_design_percent"]) in text
    of_each = np.array(figures["best_percent_of_each_target"])
    assert len(of_each) == figures["targets"]
    first, others = map(over_targets, np.split(of_each, [64]))
    if page == PAGE:
        assert f"which have {first} %. The other 64, on which nothing about choosing" in text
        assert f"was decided, have {others} %" in text
    else:
        assert f"{others} % on the 64 of them on which nothing about choosing and refining was decided" in text
    fewer = recorded("refined_designs_64")
    assert (fewer["designs_a_target"], fewer["targets"]) == (64, 64)
    assert percent(fewer["best_percent"][-1], 2) in text


def test_the_page_has_the_rounds_of_refined_designs_as_they_were_measured():
    figures, text = recorded("refined_designs"), words(PAGE)
    errors = [percent(error, digits) for error, digits in zip(figures["best_percent"], (1, 1, 2, 2), strict=True)]
    for cells in (figures["simulations_a_target"], figures["coarse_simulations_a_target"]):
        assert "| " + " | ".join(map(str, cells)) + " |" in text
    assert "| " + " | ".join([*errors[:-1], f"**{errors[-1]}**"]) + " |" in text
    assert f"met to {figures['best_median_percent']:.2f} %, the worst to {figures['best_worst_percent']:.1f} %" in text
    coarse = figures["first_order_elements_on_heldout_designs"]
    assert percent(coarse["error_percent"]) in text
    assert percent(coarse["curve_shape_error_percent"], 2) in text
    for name in ("refined", "heldout_designs"):
        bound = figures["bound"][name]
        assert with_error(bound["mean_nats"], bound["standard_error"], 0) in text
    seconds = [f"{value:.0f}" for value in figures["seconds_a_target"].values()]
    assert "{} to draw, {} to choose, {} to refine".format(*seconds) in text


def test_the_page_has_what_other_ways_and_a_finer_mesh_give_as_they_were_measured():
    refined, known, text = recorded("refined_designs"), recorded("refined_training_designs"), words(PAGE)
    best_of = recorded("inverse_design_64")["designs"]["best_of_percent"]
    assert "| " + " | ".join(best_of) + " |" in text
    assert "| " + " | ".join(percent(best, 1 if int(k) < 8 else 2) for k, best in best_of.items()) + " |" in text
    same = np.array(refined["best_percent_of_each_target"][: known["targets"]])
    refined_known = f"{percent(known['best_percent'][-1], 2)} on {known['targets']} targets"
    assert f"{refined_known}, on which the drawn ones have {over_targets(same)}" in text
    novel, away = (f"{figures['novelty']['refined']:.3f}" for figures in (refined, known))
    assert f"are {away} from the nearest training design, the drawn ones {novel}" in text
    for figures in (refined, known):
        finer = figures["on_a_finer_mesh"]
        assert f"by {percent(finer['best_percent'])}, {finer['targets']} targets" in text
        assert f"{100 * figures['pixels_changed']:.1f} %" in text


def test_the_page_has_the_sweeps_as_they_were_measured():
    figures, text = recorded("inverse_design_sweeps"), words(PAGE)
    labels = {
        "vdm": "`VDMScheduler`",
        "ddpm": "DDPM",
        "predictor-corrector": "`PredictorCorrectorScheduler`, two evaluations a step",
        "adams-bashforth": "`ProbabilityFlowScheduler`, Adams-Bashforth, log-SNR",
        "dpmsolver++": "DPM-Solver++",
    }
    assert figures["steps"].keys() == labels.keys()
    for name, found in figures["steps"].items():
        errors = [each["single_percent"]["mean"] for each in found.values()]
        cells = [f"{error:.{0 if i < 2 else 1}f}" for i, error in enumerate(errors)]
        assert f"| {labels[name]} | " + " | ".join(cells) + " |" in text
    for found in (
        [each["single_percent"] for each in figures["training_designs"].values()],
        figures["predictor_error_percent"].values(),
    ):
        first, second, last = (with_error(each["mean"], each["standard_error"], 1) for each in found)
        assert f"{first}, {second} and {last} %" in text


def test_the_page_has_the_variants_of_the_denoiser_as_they_were_measured():
    figures, text = recorded("denoiser_variants"), words(PAGE)
    assert f"{figures['denoiser_steps']:,} steps on the checkpoint's latents" in text
    for found in figures["variants"].values():
        bounds = [found[name] for name in ("bound", "bound_given_the_response")]
        cells = [with_error(bound["mean_nats"], bound["standard_error"], 0) for bound in bounds]
        errors = zip(("denoiser_alone", "with_predictor"), (0, 1), strict=True)
        cells += [percent(found[name]["single_percent"], digits) for name, digits in errors]
        assert "| " + " | ".join(cells) + " |" in text


@pytest.mark.parametrize("page", [README, COMPOSITES])
def test_the_best_of_64_drawn_is_what_was_measured(page):
    designs, text = recorded("inverse_design_64")["designs"], words(page)
    assert f"{percent(designs['best_percent'], 2)}, {designs['targets']} targets" in text
    if page == README:
        known, finer = recorded("refined_training_designs"), recorded("refined_designs")["on_a_finer_mesh"]
        assert f"{percent(known['best_percent'][-1], 2)}, {known['targets']} targets" in text
        assert f"by {percent(finer['best_percent'])}, {finer['targets']} targets" in text


def test_the_table_of_the_demo_is_what_it_printed():
    for name, target in recorded("demo")["targets"].items():
        errors = [target[kind] for kind in ("best_percent", "mean_percent", "nearest_training_design_percent")]
        assert f"| `{name}` | " + " | ".join(f"{error:.1f} %" for error in errors) + " |" in words(README)


@pytest.mark.parametrize("page", [README, PAGE, DIGITS])
def test_the_table_of_digits_is_what_was_measured(page):
    figures, text = recorded("mechanical_mnist"), words(page)
    assert f"{figures['designs']['targets']} held-out" in text
    for name, digits in {"designs": 2, "random_training_designs": 1}.items():
        single, best = (percent(figures[name][kind], digits) for kind in ("single_percent", "best_percent"))
        assert f"| {single} | {best} |" in text
    single, best = (figures["nearest_training_designs"][kind] for kind in ("single_percent", "best_percent"))
    if page == README:
        assert f"{single['mean']:.2f} % on average and {best['mean']:.2f} % the nearest" in text
    else:
        assert f"| {percent(single, 3)} | {percent(best, 3)} |" in text


def test_the_page_has_designs_beside_those_of_pixels_as_they_were_measured():
    figures, text = recorded("pixel_baseline"), words(PAGE)
    training = figures["pixel_training"]
    assert f"trained for {training['minutes']:.0f} minutes on one core, {training['steps']:,} steps" in text
    pixels, latents = (training["parameters"][kind] / 1e6 for kind in ("pixel", "latent"))
    assert f"{pixels:.2f} million weights against {latents:.2f} million" in text
    for name, label, digits in (
        ("pixel", "pixels", 0),
        ("latent", "latents, the denoiser alone", 0),
        ("latent with predictor", "latents, with the predictor, some 1.7 times the training", 1),
    ):
        cells = [label]
        for steps in ("1000 ancestral steps", "20 DDIM steps"):
            found = figures[f"{name}, {steps}"]
            seconds = found["seconds_for_the_designs_of_a_target"]
            cells += [percent(found["single_percent"], digits), f"{seconds:.{1 if seconds < 1 else 0}f} s"]
        assert "| " + " | ".join(cells) + " |" in text


def test_the_page_has_the_targets_out_of_range_as_they_were_found():
    figures, text = recorded("out_of_range"), words(PAGE)
    assert figures["possible_called_out_of_range_at"]["0.01"] == 0
    assert f"at 0.05, which calls {100 * figures['possible_called_out_of_range_at']['0.05']:.1f} % so" in text
    kinds = [found for found in figures.values() if isinstance(found, dict) and "area" in found]
    assert len(kinds) == 5
    for found in kinds:
        shares = [*found["found_at"].values(), found["found_by_the_nearest_error_alone"]]
        shares.append(found["found_by_the_shape_alone"])
        cells = [f"{found['area']:.2f}", *(f"{100 * share:.0f} %" for share in shares)]
        assert "| " + " | ".join(cells) + " |" in text


def test_the_page_has_the_sweep_of_guidance_as_it_was_measured():
    found, text = recorded("inverse_design_sweeps")["guidance_scale"], words(PAGE)
    one, five = (percent(found[scale]["single_percent"]) for scale in ("1.0", "5.0"))
    assert f"({one.removesuffix(' %')} and {five})" in text


@pytest.mark.parametrize(
    ("page", "digits", "of"),
    [
        (README, 0, "in {} % of the pixels"),
        (PAGE, 1, "in {} % of their pixels"),
        (COMPOSITES, 0, "in {} % of its pixels"),
    ],
)
def test_how_new_the_designs_are_is_what_was_measured(page, digits, of):
    figures, text = recorded("inverse_design"), words(page)
    novel = 100 * figures["novelty"]["designs"]
    assert of.format(f"{novel:.{digits}f}") in text
    assert abs(novel - 100 * figures["novelty"]["heldout_designs"]) < 0.5
    if page == COMPOSITES:
        assert f"two of a target in {100 * figures['diversity_within_a_target']['designs']:.0f} %" in text


def test_the_card_of_digits_has_the_autoencoder_and_novelty_as_they_were_measured():
    figures, text = recorded("mechanical_mnist"), words(DIGITS)
    autoencoder = figures["autoencoder"]
    assert f"autoencoder | {percent(autoencoder['error_percent'], 2)} |" in text
    assert f"gives {100 * autoencoder['pixels_reconstructed']:.0f} % of the pixels back to the level" in text
    assert f"{100 * autoencoder['soft_pixels_reconstructed']:.1f} % of those that are 0" in text
    assert f"its worst digit is wrong by {autoencoder['worst_percent']:.0f} %" in text
    novel = figures["novelty"]
    assert (
        f"in {novel['designs']:.3f} of the pixels on average, held-out digits in {novel['heldout_designs']:.3f}" in text
    )
    assert f"wrong by {figures['predictor_error_percent']['mean']:.1f} % on held-out digits" in text


def test_the_page_has_the_targets_with_open_parts_as_they_were_measured():
    found, text = recorded("open_targets")["open"], words(PAGE)
    labels = {"every_second_strain": "every second strain", "last_load_case": "shear"}
    labels |= {"nothing": "nothing", "all_load_cases_but_the_first": "all but extension along y"}
    assert found.keys() == labels.keys()
    for name, open_part in found.items():
        cells = [
            percent(open_part[kind][which], 2 if open_part[kind][which]["mean"] < 1 else 1)
            for kind in ("where_given", "retrieval_where_given")
            for which in ("single_percent", "best_percent")
        ]
        assert "| " + " | ".join([labels[name], *cells]) + " |" in text
        assert f"where {open_part['where_given']['targets']} of these targets leave something open" in text
    strains, shear = (
        percent(found[name]["everywhere"]["single_percent"]) for name in ("every_second_strain", "last_load_case")
    )
    assert f"at all strains the designs of the second row are wrong by {strains}" in text
    assert f"with all load cases those of the third row are wrong by {shear}" in text


def test_the_page_of_mechanics_has_the_designs_that_were_not_solved():
    designs = recorded("inverse_design")["designs"]
    simulated = designs["targets"] * designs["designs_a_target"]
    assert f"{designs['unsolved']} of the {simulated:,} in [`inverse_design.json`]" in words("docs/mechanics.md")


def test_the_page_on_performance_has_what_a_busy_neighbour_costs():
    text = words("docs/performance.md")
    for digits, row in zip((3, 1, 0), recorded("busy_neighbour").values(), strict=True):
        alone, beside = (f"{row[f'{name}_seconds']:.{digits}f} s" for name in ("alone", "beside"))
        assert f"| {alone} | {beside} | {row['times_as_long']:.1f} |" in text
