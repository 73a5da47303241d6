"""The page at the end: one HTML file with every picture in it, to be opened from disk or sent to a colleague."""

import base64
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fourmill.core.manifest import Manifest
from fourmill.core.modality import IMAGE_TOKENS
from fourmill.core.names import SampleKey
from fourmill.core.store import is_local
from fourmill.runtime.models import current
from fourmill.runtime.session import Session
from fourmill.runtime.superres import WAYS

PATH, GRID_PATH = "samples/index.html", "samples/samples.png"  # among the runs of a project

_TITLES = {
    "rgb": "RGB",
    "depth": "Depth (near is yellow)",
    "normal": "Surface normals",
    "semseg": "Semantic classes",
    "clip": "CLIP features (the truth's three strongest directions)",
    "det": "Boxes",
    "caption": "Captions",
    "caption to image": "From a caption to an image (text2im)",
    "superres": "From a small image's tokens to a large one's (superres)",
}

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fourmill: $dataset</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; color: #22222a; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
 h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem; border-top: 1px solid #ddd; padding-top: 1rem }
 img { max-width: 100%; image-rendering: pixelated } table { border-collapse: collapse } code { font-size: .9em }
 td, th { padding: .15rem .9rem .15rem 0; text-align: left; border-bottom: 1px solid #eee } td.n { font-variant-numeric: tabular-nums }
 p.small { color: #666; font-size: .9em }
</style></head><body>
<h1>$dataset: from a list of URLs to 4M</h1>
<p>$rows rows of the list became $train training and $val held-out samples. Everything below is held out: no network here was
trained on these images. Each picture has a column a sample, and its rows are named at the left: "truth" is the sample's own image
or label, "tokenizer" what the tokenizer gives back from its tokens, "4M" what 4M generated from the image's pixels alone. The
headings of pictures by fine-tunes of 4M say what those started from.</p>
<h2>4M from RGB alone, on $scored held-out samples</h2>
<table><tr><th>figure</th><th>4M</th><th>per-pixel mean map</th></tr>$figures</table>
<p class="small">The mean map is the training set's per-pixel mean (its most common class): what one gets without looking at the image.
depth_error: mean absolute difference of standardised depth. iou/...: each class on its own.</p>
<h2>Tokenizers, on held-out samples</h2>
<table><tr><th>tokenizer</th><th>figure</th><th>value</th><th>mean map</th><th>codebook in use</th><th>perplexity</th></tr>
$tokenizers</table>
$superres
$sheets
<h2>Where it comes from</h2>
<table>$lineage</table>
<p class="small">Follow any of these samples: <code>$trace</code>$where</p>
</body></html>
""")


def write_page(
    session: Session, manifest: Manifest, sheets: Mapping[str, bytes], scored: Mapping[str, Any], shown: SampleKey
) -> str:
    """Write the page into the store and return its path.

    Args:
        shown: one of the samples in the sheets, to be followed by whoever looks at them.
    """
    refs = {label: current(session.store, manifest.dataset, label, f"tokenizers/{label}") for label in IMAGE_TOKENS}
    model = current(session.store, manifest.dataset, "fourm", "fourm/pretrain")
    lineage = {
        "list": manifest.source_digest,
        "manifest": manifest.digest,
        **{f"tokenizer {label}": ref.digest for label, ref in refs.items()},
        "4M": f"{model.digest}, {model.report['steps']} steps, seed {model.report['seed']}",
    }
    folder = _project_folder(session.project.store)
    text = _PAGE.substitute(
        dataset=escape(manifest.dataset),
        rows=manifest.rows,
        train=manifest.num_samples("train"),
        val=manifest.num_samples("val"),
        scored=scored["samples"],
        figures="".join(_figure_rows(scored)),
        tokenizers="".join(_tokenizer_row(label, ref.report) for label, ref in refs.items()),
        superres=_superres_table(session),
        sheets="".join(_sheet(name, png) for name, png in sheets.items()),
        lineage="".join(
            f"<tr><td>{escape(k)}</td><td><code>{escape(str(v))}</code></td></tr>" for k, v in lineage.items()
        ),
        trace=escape(_trace_command(folder or "FOLDER", shown)),
        where="" if folder else ", where FOLDER is the project's",
    )
    path = session.project.runs_path(PATH)
    session.store.write(path, text.encode())
    return path


def _project_folder(store: str) -> str | None:
    """The folder that commands take as `--out`; None where the store's place does not tell."""
    path = Path(store.removeprefix("file://"))
    known = is_local(store) and path.name == "store" and (path.parent / "project.json").is_file()
    return str(path.parent) if known else None


def _trace_command(folder: str, key: SampleKey) -> str:
    return shlex.join(["fourmill", "trace", "fourm", "--out", folder, "--sample", key])


def _figure_rows(scored: Mapping[str, Any]) -> list[str]:
    rows: list[str] = []
    for name, value in scored["figures"].items():
        baseline = scored["baseline"].get(name)
        shown = "" if baseline is None else f"{baseline:.3f}"
        rows.append(f'<tr><td>{escape(name)}</td><td class="n">{value:.3f}</td><td class="n">{shown}</td></tr>')
    return rows


def _tokenizer_row(label: str, report: Mapping[str, Any]) -> str:
    headline = report["headline"]
    cells = [
        label,
        headline["name"],
        f"{headline['value']:.3f}",
        f"{headline['baseline']:.3f}",
        f"{report['usage']:.0%}",
        f"{report['perplexity']:.0f}",
    ]
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _superres_table(session: Session) -> str:
    """What super-resolution scored; nothing where the project has one resolution."""
    project = session.project
    if project.second_px is None:
        return ""
    scored = current(session.store, project.dataset, "superres", "fourm/superres").report["scored"]
    low_px, high_px = sorted((project.input_px, project.second_px))
    rows = ""
    for name, what in WAYS.items():
        shown = [scored[figure].get(name) for figure in ("psnr_db", "psnr_to_tokenizer_db")]
        cells = "".join(f'<td class="n">{"" if value is None else f"{value:.2f}"}</td>' for value in shown)
        rows += f"<tr><td>{escape(what)}</td>{cells}</tr>"
    return (
        f"<h2>Super-resolution of RGB, {low_px} to {high_px} pixels, on {scored['samples']} held-out samples</h2>"
        f"<table><tr><th>image at {high_px} pixels from</th><th>PSNR to the image, dB</th>"
        f"<th>to what the true tokens give</th></tr>{rows}</table>"
        '<p class="small">A blur scores well against the image; tokens give sharper pictures. The second column asks how near a '
        "picture is to the best that tokens can do.</p>"
    )


def _sheet(name: str, png: bytes) -> str:
    title = escape(_TITLES.get(name, name))
    return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
