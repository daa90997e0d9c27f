"""Does a Python with only torch, diffusers and transformers load a checkpoint, with the same images bit by bit?

    python benchmarks/plain_diffusers.py checkpoints/composites-32 --output benchmarks/plain_diffusers.json

Makes a virtual environment with the three packages alone, samples there and here, and compares.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from record import record

ROOT = Path(__file__).parents[1]

SAMPLE = """
import sys
import numpy, torch
if sys.argv[3] == "plain":
    import importlib.util
    assert importlib.util.find_spec("mechdiffusers") is None
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, use_safetensors=True)
else:
    from mechdiffusers import LatentDDPMPipeline
    pipe = LatentDDPMPipeline.from_pretrained(sys.argv[1])
latents = []
keep = lambda pipe, step, t, tensors: latents.append(tensors["latents"]) or tensors
options = {"generator": torch.manual_seed(0), "output_type": "np", "callback_on_step_end": keep}
images = pipe(batch_size=8, num_inference_steps=20, **options).images
numpy.savez(sys.argv[2], images=images, latents=latents[-1].numpy())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/plain_diffusers.json"))
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        plain_python = Path(folder) / "venv" / "bin" / "python"
        venv.create(Path(folder) / "venv", with_pip=True)
        install = ["-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([plain_python, *install, "torch", "diffusers", "transformers"], check=True)
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        results = {}
        for name, python in (("plain", plain_python), ("ours", sys.executable)):
            file = Path(folder) / f"{name}.npz"
            command = [python, "-c", SAMPLE, str(arguments.checkpoint.resolve()), str(file), name]
            subprocess.run(command, check=True, env=environment, cwd=folder)
            results[name] = np.load(file)
        installed = subprocess.run([plain_python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True)
    record(
        {
            "images_bit_identical": bool(np.array_equal(results["plain"]["images"], results["ours"]["images"])),
            "latents_bit_identical": bool(np.array_equal(results["plain"]["latents"], results["ours"]["latents"])),
            "packages_of_the_plain_python": sorted(line.split("==")[0] for line in installed.stdout.split()),
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
