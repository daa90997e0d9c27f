"""What is local calls nobody, unless it is told to be offline too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_runs import command_line, conditional, write_dataset

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.endswith("OFFLINE")}
    command = [sys.executable, str(ROOT / "tests" / "without_network.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_call_is_noticed_even_where_its_failure_is_passed_over(tmp_path):
    script = tmp_path / "counts_its_users.py"
    script.write_text(
        "import socket\ntry:\n    socket.create_connection(('example.org', 80))\nexcept OSError:\n    pass\n"
    )
    called = run(str(script))
    assert called.returncode == 86
    assert "called out to example.org" in called.stderr


@pytest.mark.parametrize("settings", [{}, {"streaming": True, "num_train_designs": 48}])
def test_training_on_local_parquet_files_calls_nobody(tmp_path, settings):
    dataset = write_dataset(tmp_path / "composites")
    done = run(*command_line(tmp_path / "run", **{**conditional(dataset), **settings}))
    assert done.returncode == 0, done.stderr


def test_sampling_a_local_checkpoint_calls_nobody(tmp_path):
    example = ROOT / "examples" / "01_sample_a_checkpoint.py"
    done = run(str(example), "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
