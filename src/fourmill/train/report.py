"""What a finished training leaves in the store: the model, its card, and a report that says what went into it."""

import json
from dataclasses import dataclass
from typing import Any

from fourmill.core.digest import digest_json
from fourmill.core.manifest import Manifest
from fourmill.core.order import epoch_order
from fourmill.core.store import Store
from fourmill.train.config import VERSION, TrainSpec
from fourmill.train.load import save_fourm
from fourmill.train.model import FourM
from fourmill.train.validate import chance_losses


@dataclass(frozen=True)
class Trained:
    """How a training went."""

    steps: int
    seconds: float
    loss_curve: list[list[float]]
    num_train: int
    num_val: int
    losses: dict[str, float]  # held out, by modality, in nats


def report_path(spec: TrainSpec) -> str:
    """Store path of the report of a training; a function of its inputs."""
    return f"models/{spec.name}/trained/{spec.input_digest}/report.json"


def is_done(store: Store, path: str) -> bool:
    """Whether a report is there and the model that it names is too."""
    if not store.exists(path):
        return False
    return store.exists(f"{json.loads(store.read(path))['path']}/model.safetensors")


def publish(store: Store, spec: TrainSpec, manifest: Manifest, model: FourM, trained: Trained) -> None:
    """Publish the model, then the report that makes the training done."""
    consumed = consumed_samples(spec, manifest, trained.num_train)
    report: dict[str, Any] = {
        "name": spec.name,
        "code_version": VERSION,
        "manifest": spec.manifest,
        "manifest_digest": manifest.digest,
        "init_from": spec.init_from,
        "seed": spec.config.seed,
        "steps": trained.steps,
        "seconds": round(trained.seconds, 1),
        "num_train": trained.num_train,
        "num_val": trained.num_val,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "figures": trained.losses,
        "baseline": {name: value for name, value in chance_losses(model).items() if name in trained.losses},
        "losses": trained.losses,
        "loss_curve": trained.loss_curve,
        "consumed": consumed,
        "consumed_digest": digest_json(
            [manifest.digest, spec.config.seed, spec.config.batch_size, trained.steps, consumed]
        ),
        "config": spec.config.model_dump(mode="json"),
    }
    training = {
        key: report[key] for key in ("manifest_digest", "init_from", "seed", "steps", "consumed", "consumed_digest")
    }
    digest, folder = save_fourm(store, spec.name, model, training, _card(spec, report))
    report |= {"digest": digest, "path": folder}
    store.write(report_path(spec), json.dumps(report, indent=1).encode())


def consumed_samples(spec: TrainSpec, manifest: Manifest, num_train: int) -> str:
    """The order in which samples were seen, in words; `core.order.epoch_order` gives it in full."""
    seen = spec.config.steps * spec.config.batch_size
    shards = [entry.shard for entry in manifest.splits["train"]]
    listed = ", ".join(f"{s:05d}" for s in shards) if len(shards) <= 12 else f"{shards[0]:05d} .. {shards[-1]:05d}"
    last = (seen - 1) // num_train
    first = epoch_order(num_train, spec.config.seed, 0)[:3].tolist()
    return (
        f"{seen} samples: epochs 0..{last} of {num_train} over shards {listed}, every epoch shuffled by (seed "
        f"{spec.config.seed}, epoch); the first rows are {', '.join(map(str, first))}"
    )


def _card(spec: TrainSpec, report: dict[str, Any]) -> str:
    model = spec.config.model
    rows = [f"| {name} | {value} | {report['baseline'][name]} |" for name, value in report["figures"].items()]
    return "\n".join(
        [
            f"# {spec.name}",
            "",
            f"4M: {model.encoder_depth} + {model.decoder_depth} blocks of {model.dim} channels, "
            f"{report['num_parameters'] / 1e6:.1f} M parameters.",
            "",
            "- digest of weights and config: {digest}",
            f"- manifest: {report['manifest_digest']}",
            f"- started from: {spec.init_from or 'random weights'}",
            f"- trained for {report['steps']} steps of {spec.config.batch_size}, seed {report['seed']}",
            f"- consumed {report['consumed']}",
            "",
            "| held out, nats a token | loss | guessing |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
