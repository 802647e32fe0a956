"""What comes from somebody else's files runs no code, leaves no folder and fills no memory.

That names from data stay text is tested beside what writes them: the page in test_report and test_charts, comparisons
in test_compare, Markdown, JUnit, JSON, annotations and logs in test_outputs, the terminal in test_show, test_baseline
and test_policy_commands, notebooks in test_notebook, TensorBoard and MLflow in test_loggers, W&B in test_wandb.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from planted import write_planted
from playwright.sync_api import Browser
from recorded import Touches
from synthetic import make_run
from wandb_server import Double, Logged, serving

from bias_audit import AuditDataset, read_run
from bias_audit.data.declared import read_declared
from bias_audit.data.outlines import MOST_PIXELS
from bias_audit.gate.compare import compare_runs
from bias_audit.policies.file import read_policy
from bias_audit.records.arrays import load_npz, npz_bytes, sheet_bytes
from bias_audit.records.errors import RecordError
from bias_audit.records.files import CHANGED, SAMPLES
from bias_audit.records.runs import Run
from bias_audit.records.samples import PackedMasks
from bias_audit.report.compare import write_comparison
from bias_audit.report.page import write_report
from bias_audit.report.samples import viewer_data

ROOT = Path(__file__).parents[1]


@contextmanager
def little_memory(most: int = 32 << 20) -> Iterator[None]:
    """Fails if Python and NumPy take more than `most` bytes inside: what is refused by its size is not decoded."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak >> 20} MiB were taken"


_NEVER = re.compile(
    r"eval|exec|__import__|os\.system|os\.popen|(pickle|marshal|dill|cloudpickle|joblib|shelve)\.(loads?|open|Unpickler)|torch\.jit\.load"
    r"|yaml\.(unsafe_load|full_load|load_all|unsafe_load_all|full_load_all)|torch\.package\..*|np\.loads|np\.fromstring"
)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def suspicious(tree: ast.AST) -> Iterator[str]:
    """Calls that could run what a file says."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        if not re.search("load|eval|exec|read_array|^os|^subprocess|import|np.from|torch.package|open|Unpickler", name):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            _NEVER.fullmatch(name)
            or (name in ("np.load", "numpy.load", "np.lib.format.read_array") and given.get("allow_pickle") != "False")
            or (name == "torch.load" and given.get("weights_only") not in ("True", "not trust"))
            or (name == "yaml.load" and [ast.unparse(a) for a in call.args[1:]] != ["_Loader"])
            or (name.startswith("subprocess.") and given.get("shell", "False") != "False")
        ):
            yield f"line {call.lineno}: {ast.unparse(call)}"


def test_nothing_that_is_read_is_run() -> None:
    sources = [path for folder in ("bias_audit", "callbacks", "examples") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path): list(suspicious(ast.parse(path.read_text(encoding="utf-8")))) for path in sources}
    assert len(found) > 100 and {path: calls for path, calls in found.items() if calls} == {}
    for line in (
        "eval(text)",
        "pickle.load(file)",
        "np.load(path)",
        "np.load(path, allow_pickle=trust)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "subprocess.run(text, shell=True)",
    ):
        assert list(suspicious(ast.parse(line))) == [f"line 1: {line}"]


def test_no_record_runs_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    run = read_run(make_run(tmp_path / "run", audits=1, samples=6, removal={"hair": 0.3}))
    buffer = io.BytesIO()
    np.savez(buffer, **dict.fromkeys(("ids", "labels", "pictures", "lengths"), np.array([Touches(mark)], dtype=object)))
    for name, read in ((SAMPLES, run.sample_table), (CHANGED, run.changed)):
        (run.path / name).write_bytes(buffer.getvalue())
        with pytest.raises(RecordError, match=rf"{name}: is not a whole \.npz file"):
            read()
    assert not mark.exists()


@pytest.mark.parametrize("region", ["../outside", "/etc", r"..\outside", "a/../../outside"])
def test_a_region_is_a_folder_among_the_masks(tmp_path: Path, region: str) -> None:
    root = write_planted(tmp_path / "root", per_cell=1)
    (tmp_path / "outside").mkdir()
    (root / "audit.yaml").write_text((root / "audit.yaml").read_text().replace("[corner]", f"['{region}']"))
    with pytest.raises(ValueError, match=r"audit\.yaml, line 6: spurious\.0: region .* leaves the folder"):
        read_declared(root / "audit.yaml")


def test_links_in_the_users_own_folder_are_followed(tmp_path: Path) -> None:
    root = write_planted(tmp_path / "root", per_cell=1)
    picture = next((root / "images").iterdir())
    moved = picture.rename(tmp_path / picture.name)
    picture.symlink_to(moved)
    assert read_declared(root / "audit.yaml").batch(range(4)).images.shape[0] == 4


DOWNLOAD = """
import sys
from pathlib import Path
from bias_audit.callbacks.wandb.source import download
for name in sys.argv[2:]:
    try:
        download(f"acme/doctors/{name}:v0", Path(sys.argv[1]) / name)
    except ValueError as error:
        print(name, error)
"""


def test_an_artifact_writes_only_into_its_folder_and_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", audits=1, samples=2)
    entries = Double._entries

    def forged(logged: Logged) -> dict[str, dict[str, Any]]:
        known = entries(logged)
        if logged.name == "large":
            return {name: entry | {"size": 3 << 30} for name, entry in known.items()}
        return {f"../{name}": entry for name, entry in known.items()}

    monkeypatch.setattr(Double, "_entries", staticmethod(forged))
    double = Double(artifacts=[Logged("large", 0, "r", run), Logged("outside", 0, "r", run)])
    with serving(double) as environment:
        words = [sys.executable, "-c", DOWNLOAD, str(tmp_path / "new"), "large", "outside"]
        own = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(words, env=os.environ | environment | own, capture_output=True, text=True, timeout=120)
    large, outside = done.stdout.splitlines()
    assert "bytes, expected at most" in large and "holds a file '../" in outside
    assert not any(path.is_file() for path in (tmp_path / "new").rglob("*")), "nothing is written"


def zipped(method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(kind: str, shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """An array file with any header."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


def claiming(content: bytes, size: int) -> bytes:
    """An archive whose directory says that each of its members unpacks to `size` bytes."""
    changed = bytearray(content)
    for mark in re.finditer(b"PK\x01\x02", content):
        struct.pack_into("<I", changed, mark.start() + 24, size)
    return bytes(changed)


LARGE = npy("|u1", (1 << 26,), bytes(1 << 26))
ZIPS = {
    "says that it is large": (
        claiming(zipped(a=b"x", b=b"x"), 3 << 30),
        r"unpacks to 6442450944 bytes, expected at mos",
    ),
    "says that it is small": (claiming(zipped(a=LARGE), 1000), "is not a whole"),
    "compressed in a way that unpacks all at once": (zipped(zipfile.ZIP_BZIP2, a=b"x"), "compressed in a way that no"),
    "rows of nothing": (zipped(a=npy("<U0", (10**12,))), r"an array of \(1000000000000,\) is said to be in 0 bytes"),
    "no columns": (zipped(a=npy("<f4", (10**10, 0))), "is said to be in 0 bytes"),
    "more than is there": (zipped(a=npy("<f8", (10**9,), bytes(80))), "is said to be in 80 bytes"),
}


@pytest.mark.parametrize(("content", "says"), ZIPS.values(), ids=ZIPS)
def test_an_archive_does_not_unfold(content: bytes, says: str) -> None:
    with little_memory(), pytest.raises(RecordError, match=f"records.npz: .*{says}"):
        load_npz(Path("records.npz"), content, ("a",))


def test_a_record_that_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bias_audit.records.arrays.MOST_UNPACKED", (1 << 20) + 1000)
    assert load_npz(Path("a.npz"), npz_bytes({"a": np.zeros(100)}), ("a",))["a"].shape == (100,)
    with pytest.raises(RecordError, match="a record of 1600 bytes is too large"):
        npz_bytes({"a": np.zeros(100), "b": np.zeros(100)})
    with little_memory(2 << 20), pytest.raises(RecordError, match="unpacks to 67108992 bytes"):
        load_npz(Path("a.npz"), zipped(a=LARGE), ("a",))


def jpeg_of(width: int, height: int) -> bytes:
    """A small picture whose header says that it is larger."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, height, width)
    return bytes(content)


def test_a_sheet_does_not_unfold(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", audits=1, samples=4))
    sheet = run.sheet()
    with zipfile.ZipFile(run.path / SAMPLES) as archive:
        kept = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    size = len(b"".join(sheet.thumbnails))
    back_and_forth = np.array([size, -size, size, 0], dtype="<i8")
    wide = np.array([4, 3, 96, 10**12], dtype="<i8")
    for name, values in (("thumbnail_lengths", back_and_forth), ("masks_shape", wide)):
        (run.path / SAMPLES).write_bytes(zipped(**kept | {name: npy("<i8", (4,), values.tobytes())}))
        with little_memory(), pytest.raises(RecordError, match=r"samples\.npz: its (pictures|masks) are not as"):
            run.sheet()
    # Masks stay packed, eight pixels in a byte: what unpacks to little does not become eight times as much.
    large = replace(sheet, masks=PackedMasks(np.zeros((4, 3, 1024, 1024), dtype=np.uint8), 8192))
    (run.path / SAMPLES).write_bytes(sheet_bytes(large))
    assert (run.path / SAMPLES).stat().st_size < 1 << 17
    with little_memory():
        masks = run.sheet().masks
    assert masks.shape == (4, 3, 1024, 8192) and not masks[3].any()
    (run.path / SAMPLES).write_bytes(sheet_bytes(replace(sheet, thumbnails=(jpeg_of(9000, 9000),) * 4)))
    compared = compare_runs(run, read_run(make_run(tmp_path / "other", audits=1, samples=4, seed=1)))
    for draw in (lambda: viewer_data(run), lambda: write_comparison(tmp_path / "compare.html", compared)):
        with little_memory(), pytest.raises(RecordError, match="a recorded picture has 9000 x 9000 pixels"):
            draw()


def png_of(width: int, height: int) -> bytes:
    """A picture of a few bytes that says that it is of any size."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100))))
    chunks = (
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in (*parts, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("what", ["images", "masks/corner"])
@pytest.mark.parametrize("checked_by_pillow", [True, False])
def test_a_picture_does_not_unfold(
    what: str, checked_by_pillow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_planted(tmp_path / "root", per_cell=1)
    if not checked_by_pillow:
        # As many do for whom it is in the way.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    bomb = root / what / "leaf-blue-0.png"
    bomb.write_bytes(png_of(100_000, 100_000))
    says = "decompression bomb" if checked_by_pillow else f"has 100000 x 100000 pixels, at most {MOST_PIXELS}"
    with (
        little_memory(),
        pytest.raises(ValueError, match=rf"sample 'leaf-blue-0\.png'.*{re.escape(str(bomb))}.*{says}"),
    ):
        read_declared(root / "audit.yaml").batch([0])


def test_a_picture_that_a_program_would_draw_is_none(tmp_path: Path) -> None:
    root = write_planted(tmp_path / "root", per_cell=1)
    page = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n({tmp_path}/owned) (w) file closefile\n%%EOF\n"
    (root / "images/leaf-blue-0.png").write_text(page)
    with pytest.raises(ValueError, match=r"leaf-blue-0\.png: cannot identify image file"):
        read_declared(root / "audit.yaml").batch([0])


OUTLINES: dict[str, tuple[Any, str]] = {
    "runs": ({"size": [8, 8], "counts": [0, 10**18]}, "does not fit the image's"),
    "size": ({"size": [10**9, 10**9], "counts": [10**18]}, "does not fit the image's"),
    "backwards": ({"size": [8, 8], "counts": [10**18, -(10**18) + 64]}, "does not fit the image's"),
    "text": ({"size": [8, 8], "counts": "o" * 300_000}, "a number that no run has"),
    "edges": ([[x for _ in range(500) for x in (-1e6, -1e6, 1e6, 1e6)]], "edges of 2000000000 pixels in all"),
}


@pytest.mark.parametrize(("outline", "says"), OUTLINES.values(), ids=OUTLINES)
def test_an_outline_does_not_unfold(outline: Any, says: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,doctor\n")
    image = {"id": 1, "file_name": "a.png", "height": 8, "width": 8}
    drawn = {"image_id": 1, "category_id": 1, "segmentation": outline}
    content = {"images": [image], "annotations": [drawn], "categories": [{"id": 1, "name": "tie"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    files = (tmp_path / "instances.json", tmp_path, tmp_path / "labels.csv")
    audit_set = AuditDataset.from_coco(files[0], files[1], labels=files[2], object=["tie"])
    with little_memory(), pytest.raises(ValueError, match=rf"sample 'a\.png': does not decode: .*{says}"):
        audit_set.batch([0])


LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))
MERGES = "\n".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}" for i in range(1, 40))
YAMLS = {
    "aliases": f"a0: &a0 [x]\n{LAUGHS}\n{{key}}: *a39\n",
    "merges": f"b0: &b0 {{k: v}}\n{MERGES}\n{{key}}: *b39\n",
    "itself": "{key}: &a [*a]\n",
}


@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
@pytest.mark.parametrize(("read", "key"), [(read_policy, "rules"), (read_declared, "reader")])
def test_a_text_does_not_unfold(read: Callable[[Path], Any], key: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "audit.yaml").write_text(text.replace("{key}", key))
    with little_memory(), pytest.raises(ValueError, match="aliases written out it has more than 1048576 values"):
        read(tmp_path / "audit.yaml")


def test_a_file_that_no_person_wrote_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "audit.yaml").open("wb") as file:
        file.truncate(1 << 32)
    with little_memory(), pytest.raises(ValueError, match="has 4294967296 bytes, expected at most 1048576"):
        read_policy(tmp_path / "audit.yaml")


INTRUDE = """async port => {
    const add = (tag, given) => document.body.appendChild(Object.assign(document.createElement(tag), given));
    add("script", { textContent: "window.intruder = true" });
    add("script", { src: `data:text/javascript,window.intruder=true` });
    add("img", { src: "data:," }).setAttribute("onerror", "window.intruder = true");
    add("style", { textContent: "body { border-top: 7px solid red }" });
    add("link", { rel: "stylesheet", href: `http://127.0.0.1:${port}/x.css` });
    add("img", { src: `http://127.0.0.1:${port}/x.png` });
    await fetch(`http://127.0.0.1:${port}/`, { mode: "no-cors" }).catch(() => {});
    await new Promise(done => setTimeout(done, 100));
}"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two runs that differ, with names that would run if they were no text."""
    closing = '</style></script><script>window.intruder = true</script><img src=x onerror="window.intruder = true">'
    names: dict[str, Any] = {"classes": (closing, "nurse"), "attributes": (("a", ("x", closing)),)}
    names |= {"ids": [closing, *map(str, range(23))], "removal": {"hair": 0.4}, "audits": 1}
    first, second = (make_run(tmp_path_factory.mktemp("hostile") / "run", seed=seed, **names) for seed in (0, 1))
    return read_run(first), read_run(second)


@pytest.mark.parametrize("kind", ["page", "comparison"])
def test_a_page_runs_and_loads_only_its_own(
    kind: str, hostile: tuple[Run, Run], tmp_path: Path, browser: Browser
) -> None:
    if kind == "page":
        path = write_report(hostile[0])
    else:
        path = write_comparison(tmp_path / "compare.html", compare_runs(*hostile))
    page = browser.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    if kind == "page":
        page.wait_for_selector("body[data-ready]")
        page.locator(".tile").first.click()
    # Its style is on, drawings and pictures are there, and nothing was refused or asked for.
    assert page.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") != "none"
    assert page.locator("svg path").count() > 20
    assert all(page.evaluate("Promise.all([...document.images].map(async i => (await i.decode(), i.naturalWidth)))"))
    assert complaints == [] and {url for url in requests if not url.startswith("data:")} == {path.as_uri()}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        page.evaluate(INTRUDE, listener.getsockname()[1])
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert page.evaluate("window.intruder") is None
    assert page.evaluate("getComputedStyle(document.body).borderTopWidth") == "0px"
    refused = "".join(complaints)
    assert all(name in refused for name in ("script-src", "style-src-elem", "img-src", "connect-src")), refused
    page.close()
