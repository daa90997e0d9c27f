from pathlib import Path

import pytest

from mechdiffusers.training import TrainingConfig, parse_config

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


GOOD = "output_dir: runs/a\nnum_train_designs: 64\n"


def test_the_command_line_takes_precedence_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, GOOD + "seed: 3\nlatent_channels: 6\n")
    config = parse_config(["--config", path, "--seed", "5"])
    assert (config.seed, config.latent_channels, config.kl_weight) == (5, 6, TrainingConfig.kl_weight)


def test_lists_booleans_empty_values_and_exponents_come_through(tmp_path):
    text = "output_dir: x\ndataset: somebody/designs\nautoencoder_block_out_channels: [8, 16]\nstreaming: no\n"
    config = parse_config(
        [
            "--config",
            write(tmp_path, text + "num_train_designs:\nmixed_precision: no\nautoencoder_learning_rate: 1e-4\n"),
        ]
    )
    assert config.autoencoder_block_out_channels == [8, 16]
    assert config.streaming is False
    assert config.num_train_designs is None
    assert config.mixed_precision == "no"
    assert config.autoencoder_learning_rate == 1e-4
    overridden = parse_config(["--config", write(tmp_path, text), "--autoencoder_block_out_channels", "4", "8", "16"])
    assert overridden.autoencoder_block_out_channels == [4, 8, 16]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path):
    assert parse_config(["--config", str(path)]).output_dir == f"runs/{path.stem}"


def test_a_stage_has_the_settings_of_its_prefix():
    stage = parse_config(["--output_dir", "x", "--num_train_designs", "9", "--denoiser_steps", "7"]).stage("denoiser")
    assert stage.steps == 7
    assert stage.learning_rate == TrainingConfig.denoiser_learning_rate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "learning_rte: 1\n", r"config has unknown settings \['learning_rte'\]"),
        ("- a\n- b\n", "config must hold a mapping of settings, got list"),
        (GOOD + "weight_decay: {a: 1}\n", r"config must have numbers, .* got mappings for \['weight_decay'\]"),
        ("a: [", "config must be a YAML file that can be read"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_config(["--config", write(tmp_path, text)])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="^config must be a YAML file that can be read, got .*absent.yaml"):
        parse_config(["--config", str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoiser_steps": 0}, "denoiser_steps must be positive, got 0"),
        ({"kl_weight": -0.1}, "kl_weight must be at least 0, got -0.1"),
        ({"autoencoder_learning_rate": float("nan")}, "autoencoder_learning_rate must be positive"),
        ({"autoencoder_block_out_channels": [16, 0]}, "autoencoder_block_out_channels must be positive"),
        ({"ema_decay": 1.5}, "ema_decay must lie inside"),
        (
            {"decoder_likelihood": "discretized_logistic"},
            "decoder_likelihood must be 'bernoulli' for random_composites",
        ),
        ({"num_train_designs": None}, "random_composites need num_train_designs"),
        ({"streaming": True, "num_train_designs": None}, "num_train_designs must be set with streaming=True"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler must be one of"),
        ({"streaming": True}, "random_composites need num_train_designs and streaming=False"),
        ({"validation_scheduler": "magic"}, "validation_scheduler must be one of"),
        ({"lr_scheduler": "magic"}, "lr_scheduler must be one of"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainingConfig(**{"output_dir": "x", "num_train_designs": 64, **settings})


@pytest.mark.parametrize("arguments", [["--prediction_type", "noise"], ["--seed", "x"]])
def test_values_on_the_command_line_are_checked(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--output_dir", "x", "--num_train_designs", "64", *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_an_unknown_field_on_the_command_line_is_named():
    with pytest.raises(ValueError, match="--no_such_field"):
        parse_config(["--output_dir", "x", "--num_train_designs", "64", "--no_such_field", "1"])
