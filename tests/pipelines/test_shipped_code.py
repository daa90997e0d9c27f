"""What code a checkpoint ships: ours always, that of others on request alone; and the classes that load it."""

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline

from mechdiffusers.models import ResponseEncoder, ResponsePredictor
from mechdiffusers.pipelines import LatentDDPMPipeline

REPO = "mechanic/composites"
SCRIPT = '''
    """The script of a user, with a secret in it."""

    import torch

    from mechdiffusers.models import ResponseEncoder
    from mechdiffusers.pipelines import LatentDDPMPipeline

    TOKEN = "hf_secret"


    class MyPipe(LatentDDPMPipeline):
        """Answers twice."""

        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            output.images = torch.cat([output.images] * 2)
            return output


    class LoudEncoder(ResponseEncoder):
        """Speaks louder."""

        def forward(self, response):
            return 2 * super().forward(response)
'''


@pytest.fixture
def script(tmp_path, monkeypatch) -> ModuleType:
    """The module that a user wrote, imported from its file."""
    path = tmp_path / "my_script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    spec = importlib.util.spec_from_file_location("my_script", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_script", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def loud_pipe(pipe, script) -> LatentDDPMPipeline:
    """With a component of a class of the user."""
    encoder = script.LoudEncoder.from_config(pipe.response_encoder.config)
    encoder.load_state_dict(pipe.response_encoder.state_dict())
    pipe.register_modules(response_encoder=encoder.eval())
    return pipe


def sample(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe(batch_size=2, **options).images


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model_index.json").read_text())


def sources(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


OURS = {"pipeline_latent_ddpm.py", "portable_checkpoint.py", "response_encoder/response_encoder.py"}


def test_a_class_derived_from_ours_loads_without_trust_as_itself_and_is_saved_as_ours(pipe, script, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    mine = script.MyPipe.from_pretrained(tmp_path / "checkpoint")
    assert type(mine) is script.MyPipe
    assert type(mine.response_encoder) is ResponseEncoder
    assert torch.equal(sample(mine), torch.cat([sample(pipe)] * 2))
    mine.save_pretrained(tmp_path / "again")
    assert sources(tmp_path / "again") == OURS
    assert index_of(tmp_path / "again") == index_of(tmp_path / "checkpoint")
    assert type(script.MyPipe.from_pretrained(tmp_path / "again")) is script.MyPipe
    assert torch.equal(sample(LatentDDPMPipeline.from_pretrained(tmp_path / "again")), sample(pipe))


def test_a_class_derived_from_ours_loads_from_the_hub_and_is_pushed_as_ours(hub, pipe, script, tmp_path):
    pipe.push_to_hub(REPO)
    mine = script.MyPipe.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    assert type(mine) is script.MyPipe
    mine.push_to_hub("mechanic/again")
    pushed = hub.repositories["mechanic/again"].branches["main"][-1].files
    assert {path for path in pushed if path.endswith(".py")} == OURS
    assert b"LatentDDPMPipeline.from_pretrained" in pushed["README.md"]
    assert b"MyPipe" not in pushed["README.md"]
    loaded = script.MyPipe.from_pretrained("mechanic/again", cache_dir=tmp_path / "cache")
    assert torch.equal(sample(loaded), sample(mine))


def test_a_class_derived_from_ours_is_shipped_on_request_and_loads_by_trust(pipe, script, tmp_path):
    mine = script.MyPipe(**pipe.components)
    mine.save_pretrained(tmp_path / "shipped", include_custom_code=True)
    assert index_of(tmp_path / "shipped")["_class_name"] == ["my_script", "MyPipe"]
    assert sources(tmp_path / "shipped") == {"my_script.py", "response_encoder/response_encoder.py"}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "shipped", trust_remote_code=True)
    assert type(loaded).__name__ == "MyPipe"
    assert torch.equal(sample(loaded), sample(mine))
    assert type(script.MyPipe.from_pretrained(tmp_path / "shipped")) is script.MyPipe
    assert torch.equal(sample(LatentDDPMPipeline.from_pretrained(tmp_path / "shipped")), sample(pipe))


def test_components_of_a_class_derived_from_ours_switch_over_and_back(pipe, script):
    mine = script.MyPipe.from_pipe(pipe)
    assert type(mine) is script.MyPipe
    assert mine.components == pipe.components
    back = LatentDDPMPipeline.from_pipe(mine)
    assert type(back) is LatentDDPMPipeline
    assert torch.equal(sample(back), sample(pipe))


def test_the_code_of_others_is_refused_with_how_to_ask_and_nothing_is_written(hub, loud_pipe, script, tmp_path):
    message = (
        r"^component 'response_encoder' must have a class of mechdiffusers, diffusers or transformers, got LoudEncoder"
        rf": include_custom_code=True ships {script.__file__}, with everything that stands in it$"
    )
    with pytest.raises(ValueError, match=message):
        loud_pipe.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert not list(tmp_path.glob(".unfinished*"))
    with pytest.raises(ValueError, match=message):
        loud_pipe.push_to_hub(REPO)
    assert hub.repositories == {}
    with pytest.raises(ValueError, match=message):
        loud_pipe.save_pretrained(tmp_path / "checkpoint", push_to_hub=True)
    assert not (tmp_path / "checkpoint").exists()
    assert hub.repositories == {}


def test_the_code_of_others_ships_on_request_and_loads_again_from_a_folder(loud_pipe, script, tmp_path):
    loud_pipe.save_pretrained(tmp_path / "checkpoint", include_custom_code=True)
    shipped = tmp_path / "checkpoint" / "response_encoder" / "my_script.py"
    assert shipped.read_text() == Path(script.__file__).read_text()
    assert sources(tmp_path / "checkpoint") == {
        "pipeline_latent_ddpm.py",
        "portable_checkpoint.py",
        "response_encoder/my_script.py",
    }
    with pytest.raises(ValueError, match="trust_remote_code"):
        LatentDDPMPipeline.from_pretrained(tmp_path / "checkpoint")
    for cls in (LatentDDPMPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)
        assert type(loaded.response_encoder).__name__ == "LoudEncoder"
        assert torch.equal(sample(loaded), sample(loud_pipe))
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "response_encoder" / "my_script.py").read_text() == shipped.read_text()


def test_the_code_of_others_ships_on_request_and_loads_again_from_the_hub(hub, loud_pipe, tmp_path):
    loud_pipe.save_pretrained(tmp_path / "composites", include_custom_code=True, push_to_hub=True)
    pushed = hub.repositories[REPO].branches["main"][-1].files
    assert b"hf_secret" in pushed["response_encoder/my_script.py"]
    loaded = LatentDDPMPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache", trust_remote_code=True)
    assert type(loaded.response_encoder).__name__ == "LoudEncoder"
    assert torch.equal(sample(loaded), sample(loud_pipe))


@pytest.mark.parametrize("include_custom_code", [False, True])
def test_a_class_without_a_source_file_is_refused_by_name(pipe, tmp_path, include_custom_code):
    scope = {"__name__": "console", "ResponseEncoder": ResponseEncoder}
    exec("class Typed(ResponseEncoder):\n    pass", scope)
    pipe.register_modules(response_encoder=scope["Typed"].from_config(pipe.response_encoder.config))
    message = "^component 'response_encoder' must have a class whose source file can be shipped, got Typed without one"
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(tmp_path / "checkpoint", include_custom_code=include_custom_code)
    assert not (tmp_path / "checkpoint").exists()


def test_a_pipeline_class_without_a_source_file_is_saved_as_ours_and_refused_where_its_code_is_asked_for(
    pipe, tmp_path
):
    scope = {"__name__": "console", "LatentDDPMPipeline": LatentDDPMPipeline}
    exec("class Typed(LatentDDPMPipeline):\n    pass", scope)
    typed = scope["Typed"](**pipe.components)
    with pytest.raises(ValueError, match="^pipeline must have a class whose source file can be shipped, got Typed"):
        typed.save_pretrained(tmp_path, include_custom_code=True)
    typed.save_pretrained(tmp_path)
    assert sources(tmp_path) == OURS


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
@pytest.mark.parametrize("parts", [["unet"], ["response_encoder"], ["vae", "unet", "response_encoder"]])
def test_compiled_parts_are_saved_as_what_they_were_compiled_from(pipe, tmp_path, parts, in_place):
    """Compiling is put off until a part runs, which none does here: no compiler is needed."""
    pipe.save_pretrained(tmp_path / "expected")
    expected = sample(pipe)
    for name in parts:
        part = pipe.components[name]
        if in_place:
            part.compile()
        else:
            setattr(pipe, name, torch.compile(part))
    pipe.save_pretrained(tmp_path / "compiled")
    LatentDDPMPipeline(**pipe.components).save_pretrained(tmp_path / "again")
    LatentDDPMPipeline.from_pipe(pipe).save_pretrained(tmp_path / "switched")
    files = {path.relative_to(tmp_path / "expected") for path in (tmp_path / "expected").rglob("*.*")}
    for folder in (tmp_path / "compiled", tmp_path / "again", tmp_path / "switched"):
        assert {path.relative_to(folder) for path in folder.rglob("*.*")} == files
        for file in files:
            assert (folder / file).read_bytes() == (tmp_path / "expected" / file).read_bytes(), file
    assert torch.equal(sample(LatentDDPMPipeline.from_pretrained(tmp_path / "compiled")), expected)


@pytest.mark.parametrize("name", ["pipeline_latent_ddpm", "pipeline_latent_ddpm.py", "."])
def test_the_file_of_the_pipeline_is_a_custom_pipeline(pipe, tmp_path, monkeypatch, name):
    pipe.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path / "checkpoint")
    custom = name if name == "pipeline_latent_ddpm" else str(tmp_path / "checkpoint" / name)
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path / "checkpoint", custom_pipeline=custom, trust_remote_code=True, use_safetensors=True
    )
    assert type(loaded).__name__ == "LatentDDPMPipeline"
    assert torch.equal(sample(loaded), sample(pipe))


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_auto_model_loads_the_encoder_of_a_checkpoint(hub, make_pipeline, tmp_path, where):
    pipe = make_pipeline(predictor=True)
    pipe.save_pretrained(tmp_path / "composites", push_to_hub=where == "hub")
    source, options = (
        (REPO, {"cache_dir": tmp_path / "cache"}) if where == "hub" else (str(tmp_path / "composites"), {})
    )
    options |= {"subfolder": "response_encoder", "trust_remote_code": True}
    loaded = AutoModel.from_pretrained(source, **options)
    assert type(loaded).__name__ == "ResponseEncoder"
    assert type(loaded) is not ResponseEncoder
    response = torch.rand(2, 2, 3)
    assert torch.equal(loaded(response), pipe.response_encoder(response))


def test_auto_model_loads_the_folder_of_the_predictor(make_pipeline, tmp_path):
    pipe, images = make_pipeline(predictor=True), torch.rand(2, 1, 8, 8).round()
    pipe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path / "response_predictor"), trust_remote_code=True)
    assert type(loaded).__name__ == "ResponsePredictor"
    assert torch.equal(loaded.predict(images), pipe.response_predictor.predict(images))


def test_our_networks_of_a_checkpoint_load_by_their_installed_classes(make_pipeline, tmp_path):
    pipe, images = make_pipeline(predictor=True), torch.rand(2, 1, 8, 8).round()
    pipe.save_pretrained(tmp_path)
    encoder = ResponseEncoder.from_pretrained(tmp_path, subfolder="response_encoder")
    predictor = ResponsePredictor.from_pretrained(tmp_path, subfolder="response_predictor")
    response = torch.rand(2, 2, 3)
    assert torch.equal(encoder(response), pipe.response_encoder(response))
    assert torch.equal(predictor.predict(images), pipe.response_predictor.predict(images))


@pytest.mark.slow
def test_a_class_in_the_very_script_that_runs_loads_saves_and_is_refused_as_one_in_a_file(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    torch.save(sample(pipe), tmp_path / "expected.pt")
    script = textwrap.dedent(SCRIPT) + textwrap.dedent("""
        if __name__ == "__main__":
            import sys

            folder = sys.argv[1]
            mine = MyPipe.from_pretrained(f"{folder}/checkpoint")
            assert type(mine) is MyPipe
            generator = torch.Generator().manual_seed(0)
            options = {"num_inference_steps": 3, "generator": generator, "output_type": "latent"}
            assert torch.equal(mine(batch_size=2, **options).images[:2], torch.load(f"{folder}/expected.pt"))
            mine.save_pretrained(f"{folder}/saved")
            mine.register_modules(response_encoder=LoudEncoder.from_config(mine.response_encoder.config))
            try:
                mine.save_pretrained(f"{folder}/refused")
            except ValueError as error:
                assert f"include_custom_code=True ships {__file__}" in str(error), error
            else:
                raise AssertionError("the script went along")
            mine.save_pretrained(f"{folder}/shipped", include_custom_code=True)
    """)
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(sample(LatentDDPMPipeline.from_pretrained(tmp_path / "saved")), sample(pipe))
    assert not (tmp_path / "refused").exists()
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path / "shipped", trust_remote_code=True)
    assert type(loaded.response_encoder).__name__ == "LoudEncoder"
