"""What holds for the house as a whole: arrows point one way, code travels alone, the wheel is complete."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mechdiffusers

ROOT = Path(__file__).parents[1]
ROOMS = ("evaluation", "mechanics", "microstructures", "models", "pipelines", "schedulers", "training")
#: What each room may import of ours; the journey of the data has no way back.
MAY_IMPORT = {
    "mechanics": {"atomic_file"},
    "microstructures": {"atomic_file", "mechanics"},
    "models": set(),
    "schedulers": set(),
    "pipelines": {"schedulers"},
    "evaluation": {"atomic_file", "pipelines", "schedulers", "microstructures", "mechanics"},
    "training": {"atomic_file", "evaluation", "mechanics", "microstructures", "models", "pipelines", "schedulers"},
}
TRAVELS = [
    *(ROOT / "pipelines" / f"{stem}.py" for stem in ("pipeline_latent_ddpm", "portable_checkpoint")),
    *(path for path in (ROOT / "models").glob("*.py") if path.stem != "__init__"),
    *(ROOT / "schedulers").glob("scheduling_*.py"),
    *(
        ROOT / "schedulers" / f"{stem}.py"
        for stem in ("log_snr_curve", "probability_flow_tableaux", "variance_preserving_scheduler")
    ),
]


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports; relative ones keep their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("mechdiffusers.")}
        assert ours - {room} <= MAY_IMPORT[room], path


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: path.name)
def test_what_travels_imports_nothing_that_a_user_of_a_checkpoint_lacks(path):
    allowed = {"torch", "numpy", "diffusers", "transformers", "safetensors", "huggingface_hub"}
    allowed |= sys.stdlib_module_names
    siblings = {name for name in imports(path) if name.startswith(".")}
    assert {name.split(".")[0] for name in imports(path) - siblings} <= allowed
    for sibling in siblings:  # one level: a helper that travels imports no helper
        assert not any(name.startswith(".") for name in imports(path.parent / f"{sibling[1:]}.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_exists_and_is_documented(room):
    module = importlib.import_module(f"mechdiffusers.{room}")
    for name in module.__all__:
        assert getattr(module, name).__doc__, name


def test_the_front_door_is_lazy_and_complete():
    assert all(hasattr(mechdiffusers, name) for name in mechdiffusers.__all__)
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = mechdiffusers.magic
    script = "import sys, mechdiffusers; assert 'torch' not in sys.modules; mechdiffusers.random_composites(1)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_versions_agree():
    assert re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1] == mechdiffusers.__version__
    assert f"version: {mechdiffusers.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_package_under_test_is_the_one_that_was_asked_for():
    expected = Path(os.environ.get("MECHDIFFUSERS_FROM", ROOT)).resolve()
    for room in ROOMS:
        module = importlib.import_module(f"mechdiffusers.{room}")
        assert Path(module.__file__).resolve().is_relative_to(expected)


def test_links_and_pictures_of_the_pages_exist():
    cards = set((ROOT / "model_cards").glob("*.md")) - {ROOT / "model_cards" / "template.md"}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *cards, *(ROOT / "data").glob("*/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("checkpoint", sorted((ROOT / "checkpoints").iterdir()), ids=lambda path: path.name)
def test_the_code_of_a_released_checkpoint_is_links_to_what_travels(checkpoint):
    assert {path.name for path in checkpoint.glob("*.py")} == {"pipeline_latent_ddpm.py", "portable_checkpoint.py"}
    shipped = list(checkpoint.rglob("*.py"))
    assert {"response_encoder.py", "response_predictor.py"} <= {path.name for path in shipped}
    for path in shipped:
        assert path.is_symlink(), path
        assert not path.readlink().is_absolute(), path
        assert path.resolve() in [source.resolve() for source in TRAVELS], path
        assert path.name == path.resolve().name


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_run(script, tmp_path):
    quick = ["--steps", "4"] if "--steps" in script.read_text() else []
    command = [sys.executable, str(script), "--output_dir", str(tmp_path), *quick]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png"))
