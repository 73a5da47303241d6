"""The two sides of bench.tokenizers, each a process of its own that takes steps when it is told to and says what they took.

python -m bench.tokenizer_sides ours|theirs WORK: answers each line of stdin with a line of JSON. WORK is a `Work` as JSON.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_THEIR_PACKAGES = _ROOT / ".venv-bench-ml4m"  # what the public 4M's tokenizers need beside our environment
# Without their dependencies: torch, numpy and the rest are those of this environment, so that both sides have the same.
_PINS = (
    "diffusers==0.20.0",
    "huggingface_hub==0.24.0",
    "einops",
    "importlib_metadata",
    "zipp",
    "webdataset",
    "braceexpand",
)
_MORE = ("ftfy", "wcwidth", "scikit-learn", "joblib", "threadpoolctl")
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_GRAD = 1e-4, (0.9, 0.95), 0.05, 1.0
CODES = {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}
CHANNELS = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 64, "clip": 512}
DIFFUSION = ("rgb", "depth", "normal")


@dataclass(frozen=True)
class Work:
    """What both sides do."""

    label: str
    batch: int
    px: int
    threads: int = 1
    peer: str = ""
    is_compiled: bool = False  # ours; the public code has no such choice
    has_graphs: bool = False  # ours too
    device: str = "cpu"
    precision: str = "fp32"


class Side:
    """One side, running."""

    def __init__(self, name: str, work: Work) -> None:
        command = [sys.executable, "-m", "bench.tokenizer_sides", name, json.dumps(asdict(work))]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=_ROOT
        )
        self.work = work
        self._is_ready = False

    def step(self) -> dict[str, float]:
        """Take one: seconds, loss, and the highest memory so far."""
        self.begin()
        return self.finish()

    def begin(self) -> None:
        """Begin a step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()

    def finish(self) -> dict[str, float]:
        """What the step took."""
        if not self._is_ready:
            self._answer()  # the first line says that it is there
            self._is_ready = True
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"a side of {self.work.label} has ended: {self._errors.read()[-2000:]}")
        return json.loads(line)


def make_environment() -> None:
    """Their packages, from PyPI, if they are not there."""
    done = _THEIR_PACKAGES / ".done"
    if not done.exists():
        target = ["--no-deps", "--target", str(_THEIR_PACKAGES), "--python", sys.executable]
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--quiet", *target, *_PINS, *_MORE], check=True)
        done.touch()


def inputs(label: str, batch: int, px: int) -> Any:
    """A batch as the networks see it: numbers of about the range of real ones."""
    import torch

    torch.manual_seed(0)
    if label == "semseg":
        return torch.randint(134, (batch, px, px))
    side = px // 16 if label == "clip" else px
    return torch.randn(batch, CHANNELS[label], side, side).clamp(-1, 1)


def _ours(work: Work) -> Callable[[], float]:
    import numpy as np

    from fourmill.core.process import prepare_torch
    from fourmill.tokenize.presets import paper_tokenizers
    from fourmill.tokenize.state import start
    from fourmill.tokenize.train import train_step
    from fourmill.tokenize.train_set import LabelArrays

    prepare_torch(work.threads, work.precision == "bf16")
    config = paper_tokenizers()[work.label]
    training = config.training.model_copy(
        update={
            "precision": work.precision,
            "learning_rate": LEARNING_RATE,
            "ema_decay": None,
            "batch_size": work.batch,
            "compile": work.is_compiled,
            "cuda_graphs": work.has_graphs,
        }
    )
    config = config.model_copy(update={"training": training})
    one = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    state = start(
        config, LabelArrays((one * 65535).astype(np.uint16), one, one.astype(np.uint8), len(one)), work.device
    )
    x = inputs(work.label, work.batch, work.px).to(work.device)
    return lambda: train_step(state, x, config).loss


def flops_of(work: Work) -> float:
    """Floating-point operations of a training step for one image, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    step = _ours(replace(work, batch=1, is_compiled=False))
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def _theirs(work: Work) -> Callable[[], float]:
    sys.path[:0] = [work.peer, str(_THEIR_PACKAGES)]
    os.environ["USE_FLAX"] = "0"  # a newer JAX, where there is one, is not theirs
    # Ours is for another huggingface_hub, and is in none of their networks; this module wants pandas for nothing here.
    sys.modules["transformers"] = None  # type: ignore[assignment]
    sys.modules["fourm.utils.generation_datasets"] = types.ModuleType("fourm.utils.generation_datasets")
    import torch
    from fourm.vq.vqvae import VQVAE, DiVAE  # pyright: ignore[reportMissingImports]
    from torch.nn import functional as F

    torch.backends.cudnn.benchmark = True  # as their programs have it
    label, batch = work.label, work.batch
    is_diffusion = label in DIFFUSION
    common: dict[str, Any] = {
        "image_size": 224,
        "n_channels": CHANNELS[label],
        "n_labels": 134 if label == "semseg" else None,
        "patch_proj": label != "clip",
        "post_mlp": True,
        "codebook_size": CODES[label],
        "sync_codebook": False,
        "threshold_ema_dead_code": batch * (work.px // 16) ** 2 / (32 * CODES[label]),
    }
    diffusion = {"beta_schedule": "linear", "prediction_type": "sample"}
    model = (DiVAE(**common, **diffusion) if is_diffusion else VQVAE(**common)).train().to(work.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)
    x = inputs(label, batch, work.px).to(work.device)
    losses = {"semseg": F.cross_entropy, "depth": F.smooth_l1_loss, "clip": F.smooth_l1_loss}

    def step() -> float:
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
            if is_diffusion:
                noise, steps = torch.randn_like(x), torch.randint(1000, (batch,), device=x.device)
                decoded, code_loss = model(x, model.noise_scheduler.add_noise(x, noise, steps), steps)
            else:
                decoded, code_loss = model(x)
            loss = losses.get(label, F.mse_loss)(decoded, x) + code_loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def main() -> None:
    """Make a side and answer."""
    name, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    import torch

    torch.set_num_threads(work.threads)
    said, sys.stdout = sys.stdout, sys.stderr  # the other side's libraries print
    flops = flops_of(work) if name == "ours" and work.device == "cuda" else 0.0
    if flops:
        torch.cuda.empty_cache()
    step = (_ours if name == "ours" else _theirs)(work)

    def answer(**values: float) -> None:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        if work.device == "cuda":
            peak_mb = torch.cuda.max_memory_reserved() / 1e6  # what a graph's replay holds is not counted as allocated
        print(json.dumps({"peak_mb": peak_mb, "flops": flops, **values}), file=said, flush=True)

    answer()
    for _ in sys.stdin:
        if work.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start, cpu = time.perf_counter(), time.process_time()
        loss = step()
        if work.device == "cuda":
            torch.cuda.synchronize()
        answer(seconds=time.perf_counter() - start, cpu_s=time.process_time() - cpu, loss=loss)


if __name__ == "__main__":
    main()
