"""Predictions for image files and folders with the model of a run. Imports no Lightning.

Images are processed in chunks of at most `_CHUNK_BYTES`: all cores decode a chunk, the model predicts it in batches,
its rows are written. Memory does not grow with the number of files, apart from their names.
"""

import contextlib
import csv
import json
import mimetypes
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from cifar_lightning.data import image_decoding
from cifar_lightning.data.image_folder import (
    CACHE_FOLDER,
    NOT_IMAGES,
    Skipped,
    class_name_of,
    is_hidden,
    write_skipped_files,
)
from cifar_lightning.data.memory import is_out_of_memory, keep_freed_memory
from cifar_lightning.data.progress import progress
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.files import check_output, read_bytes, replacing
from cifar_lightning.formatting import clipped, csv_cell, percent, plural, printable, span
from cifar_lightning.inference.bfloat16 import NUM_SAMPLED, Logits, faster_logits
from cifar_lightning.inference.trained_model import TrainedModel, load_trained_model
from cifar_lightning.metrics.significance import wilson_interval
from cifar_lightning.models.cpu_convolutions import faster_convolutions
from cifar_lightning.models.stems import in_eval_mode
from cifar_lightning.runs.folder import RunFolder, refuse_file_of_run

_CHUNK_BYTES = 1 << 28  # 87,381 images of 32 pixels, so that starting worker processes per chunk costs little
# Defaults of --batch_size. On two cores SmallNet takes 1.5 ms per image in batches of 32 or 64 and 2.1 ms in batches
# of 256, whose activations exceed the cache.
_BATCH_SIZE = {"cuda": 256, "cpu": 64}
_FASTER_FROM = 256  # images; for few it is not worthwhile to change how the process keeps memory
_BFLOAT16_FROM = 512  # images, as 64 of them are computed twice to see what bfloat16 changes
_NAMED = 2  # unreadable images on stderr, next to the line that counts all; without --output, which lists them, more
_NAMED_WITHOUT_LIST = 20
_TOP_K = 3  # by default
_MOST_FREQUENT = 5  # classes in the summary
_DIGITS = 7  # of a probability in float32
_MAX_LIST_BYTES = 64 << 20  # of an earlier list of files without a row


class Prediction(NamedTuple):
    """What a model predicts for an image.

    Attributes:
        path: Its file; empty for an image that is not from a file.
        top: Class names with their probabilities, the most probable first.
    """

    path: str
    top: list[tuple[str, float]]

    @property
    def class_name(self) -> str:
        """The most probable class."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """Its probability."""
        return self.top[0][1]


Write = Callable[[Prediction], None]


def predict_images(
    run: RunFolder,
    paths: Sequence[Path],
    *,
    output: Path | None,
    top_k: int | None = None,
    batch_size: int | None = None,
    calibrated: bool = False,
    in_float32: bool = False,
    force: bool = False,
    trust_code: bool = False,
) -> int:
    """Predict image files and write a row for each, in order; see `find_images`.

    Images in class folders (`find_labels`) get a label, and their accuracy is printed.

    Images that cannot be read get no row. They, and files in folders that are skipped, are counted on stderr and listed
    with their reasons next to `output`; see `skipped_path`.

    Args:
        run: A run with a checkpoint.
        paths: Image files and folders.
        output: A .csv, or a .jsonl or .json for JSON lines. None writes JSON lines to stdout.
        top_k: Number of most probable classes per image. Default: 3, or all of fewer classes.
        batch_size: Default: 256 on CUDA, 64 on CPU.
        calibrated: Divide the logits by the run's temperature.
        in_float32: Compute no image in bfloat16; see `predict_files`.
        force: Overwrite `output`.
        trust_code: Import a model of one's own, which the checkpoint names.

    Returns:
        The number of images that could not be read.

    Raises:
        UserError: An argument is wrong, or the output cannot be written; an old file is then unchanged.
        RunError: No image can be read, or memory is short; an old file is then unchanged.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: 1 or more.")
    if output is not None:
        if output.suffix.lower() not in (".csv", ".jsonl", ".json"):
            raise UserError(f"--output {output}: give a .csv, or a .jsonl or .json for JSON lines.")
        refuse_file_of_run(output)
        check_output(output, force)
    found, skipped = find_images(paths)
    trained = load_trained_model(run, trust_code=trust_code, calibrated=calibrated)
    labels = find_labels(paths, found, trained.class_names)
    top_k = choose_top_k(trained, top_k)
    began = time.monotonic()
    counts: Counter[str] = Counter()
    num_labelled = num_correct = 0
    unreadable: list[Skipped] = []
    remarks: image_decoding.Remarks = {}
    hide_bar = output is None and sys.stdout.isatty()  # the printed lines show the progress
    predictions = predict_files(
        trained,
        found,
        unreadable,
        remarks,
        top_k=top_k,
        batch_size=batch_size,
        in_float32=in_float32,
        hide_bar=hide_bar,
    )
    # Closed here and not by the garbage collector, as it shows a bar.
    with _rows(output, top_k, labels) as write, contextlib.closing(predictions):
        for prediction in predictions:
            counts[prediction.class_name] += 1
            if prediction.path in labels:
                num_labelled += 1
                num_correct += labels[prediction.path] == prediction.class_name
            write(prediction)
        if output is not None and not counts:  # before an older output is replaced, whose list stays with it
            _report_skipped(unreadable, skipped, skipped_path(output, force=False), num_named=1)
            raise RunError(f"--output {output}: not written; none of {plural(len(found), 'file')} can be read.")
    for line in image_decoding.remark_lines(remarks, found):
        print(printable(line), file=sys.stderr)
    _report_skipped(unreadable, skipped, None if output is None else skipped_path(output, force))
    if output is not None and force and not (unreadable or skipped):
        _remove_outdated_list(skipped_path(output, force), found)
    if output is not None:
        _summarize(output, counts, time.monotonic() - began)
    if num_labelled:
        interval = span(wilson_interval(num_correct, num_labelled))
        print(
            f"Accuracy {percent(num_correct / num_labelled)} (95 % interval {interval}): {num_correct:,} of "
            f"{plural(num_labelled, 'image')} in class folders",
            file=sys.stdout if output is not None else sys.stderr,
        )
    return len(unreadable)


def find_images(paths: Sequence[Path]) -> tuple[list[str], list[Skipped]]:
    """List the given image files, and those in the given folders and their subfolders, sorted by path.

    In folders these are all files that may be images: hidden files, hidden folders, links to folders and files with the
    suffix of something else are skipped. Given files are listed whatever their name, and twice if given twice.

    Returns:
        The images; path and reason of all that is skipped.

    Raises:
        UserError: A path does not exist, a folder cannot be searched, or there is no image below it.
    """
    found: list[str] = []
    skipped: list[Skipped] = []
    for path in paths:
        if os.path.isdir(path):
            below = sorted(_images_below(path, skipped))
            if not below:
                num = f" ({plural(len(skipped), 'other file')})" if skipped else ""
                raise UserError(
                    f"{path}: no images in this folder or its subfolders{num}; give files to try them anyway."
                )
            found += below
        elif os.path.exists(path):
            found.append(str(path))
        else:
            raise UserError(f"{path}: no such file or folder.")
    if not found:
        raise UserError("PATH: give image files or folders.")
    return found, skipped


def find_labels(paths: Sequence[Path], found: Sequence[str], class_names: Sequence[str]) -> dict[str, str]:
    """Return the class name by path of the images in class folders.

    A given folder holds class folders if each of its subfolders has the name of a class; hidden ones and links do not
    count. Of a folder with other subfolders as well, these are named on stderr and no image gets a label.
    """
    labels: dict[str, str] = {}
    known = frozenset(class_names)
    for top in (path for path in paths if path.is_dir()):
        with os.scandir(top) as entries:
            folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        class_of = {entry.name: class_name_of(entry.name) for entry in folders if not is_hidden(entry.name)}
        others = sorted(name for name, class_name in class_of.items() if class_name not in known)
        if others and len(others) < len(class_of):
            text = f"{top}: no labels: {clipped(', '.join(others))} among its folders is no class of the run"
            print(printable(text), file=sys.stderr)
        if others or not class_of:
            continue
        start = os.path.join(top, "")
        for file in found:
            folder = file.removeprefix(start).partition(os.sep)[0]
            # Not of files that are given by name and lie in a hidden folder, behind a link or behind "..".
            if file.startswith(start) and folder in class_of:
                labels[file] = class_of[folder]
    return labels


def _images_below(top: Path, skipped: list[Skipped]) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: this folder cannot be searched ({error.strerror}).") from error

    kinds = mimetypes.MimeTypes()  # Python's own, and none of the system
    for folder, subfolders, names in os.walk(top, onerror=refuse):
        links = {name for name in subfolders if os.path.islink(os.path.join(folder, name))}
        hidden = {*filter(is_hidden, subfolders)}
        skipped += [(os.path.join(folder, name), "hidden folder") for name in sorted(hidden - {CACHE_FOLDER})]
        skipped += [(os.path.join(folder, name), "link to a folder") for name in sorted(links - hidden)]
        subfolders[:] = [name for name in subfolders if name not in hidden]
        for name in sorted(names):
            suffix, kind = os.path.splitext(name)[1].lower(), kinds.guess_type(name)[0] or ""
            if is_hidden(name):
                skipped.append((os.path.join(folder, name), "hidden"))
            elif suffix in NOT_IMAGES or kind.partition("/")[0] not in ("", "image"):
                skipped.append((os.path.join(folder, name), f"not an image, by its suffix {suffix}"))
            else:
                yield os.path.join(folder, name)


# -- predictions ------------------------------------------------------------------------------------------------


def choose_top_k(trained: TrainedModel, top_k: int | None) -> int:
    """Return how many classes are predicted for an image: `top_k`, or by default 3, or all of fewer classes."""
    num_classes = len(trained.class_names)
    if top_k is None:
        return min(_TOP_K, num_classes)
    if top_k < 1:
        raise UserError(f"--top_k {top_k}: 1 or more.")
    if top_k > num_classes:
        raise UserError(f"--top_k {top_k}: the run has {num_classes} classes; give at most as many.")
    return top_k


def rank_classes(
    trained: TrainedModel,
    images: UInt8[np.ndarray, "n height width channels"],
    top_k: int,
    compute_logits: Logits | None = None,
) -> list[list[tuple[str, float]]]:
    """Return the most probable classes of a batch of images at the model's size, on CUDA if there is any.

    `compute_logits` replaces the model's own; see `faster_logits`.

    Raises:
        UserError: The model's logits are not finite.
        RunError: Memory is short.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _memory_for(len(images)):
        with torch.inference_mode(False):  # parameters that it moves in that mode could not be trained afterwards
            trained.model.to(device)
        with torch.inference_mode(), in_eval_mode(trained.model):  # `Run.model` may be in training mode
            logits = (compute_logits or trained.logits)(torch.from_numpy(images).to(device))
            # By logits, as probabilities of large ones are equal; stable: the first of equal ones wins, as in argmax.
            classes = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
            probs = logits.softmax(1).gather(1, classes)
    if not probs.isfinite().all():
        raise UserError(f"{trained.checkpoint}: the model predicts NaN; its training diverged.")
    return [
        [(trained.class_names[k], float(f"{prob:.{_DIGITS}g}")) for k, prob in zip(ranked, row, strict=True)]
        for row, ranked in zip(probs.tolist(), classes.tolist(), strict=True)
    ]


@contextlib.contextmanager
def _memory_for(num_images: int) -> Iterator[None]:
    """Name the way out where memory is short for images at a time."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        way_out = "lower --batch_size" if num_images > 1 else "free some, or hide the GPU by CUDA_VISIBLE_DEVICES="
        raise RunError(f"out of memory with {plural(num_images, 'image')} at a time: {way_out}.") from error


def default_batch_size() -> int:
    """Return the number of images at a time, by device."""
    return _BATCH_SIZE["cuda" if torch.cuda.is_available() else "cpu"]


def predict_files(
    trained: TrainedModel,
    paths: Sequence[str],
    unreadable: list[Skipped],
    remarks: image_decoding.Remarks,
    *,
    top_k: int,
    batch_size: int | None,
    in_float32: bool,
    hide_bar: bool = False,
) -> Generator[Prediction, None, None]:
    """Yield a prediction for each image file that can be read; the others are added to `unreadable`.

    Without `in_float32` 512 images or more are computed in bfloat16 on a CPU where that is faster, close classes in
    float32, with a line on stderr; see `faster_logits`.
    """
    size = batch_size or default_batch_size()
    is_for_bfloat16 = not in_float32 and len(paths) >= _BFLOAT16_FROM and not torch.cuda.is_available()
    compute_logits: Logits | None = None
    chunk_size = max(1, _CHUNK_BYTES // (trained.in_channels * trained.image_size**2))
    has_remarked = False
    with _faster_on_cpu(trained.model, len(paths)):
        for start in range(0, len(paths), chunk_size):
            chunk = paths[start : start + chunk_size]
            images, bad, unusual = _decoded(chunk, trained)
            for text, (num, first) in unusual.items():
                before, first_of_all = remarks.get(text, (0, start + first))
                remarks[text] = before + num, first_of_all
            unreadable += [(chunk[index], reason.removeprefix(f"{chunk[index]} ")) for index, reason in bad]
            good = np.delete(np.arange(len(chunk)), [index for index, _ in bad])
            has_remarked = has_remarked or _remark_on_dark_images(chunk, images, good[:256])
            if start == 0 and is_for_bfloat16 and len(good) >= NUM_SAMPLED:
                compute_logits = _logits_in_bfloat16(trained, images[good[:: len(good) // NUM_SAMPLED]], size)
            done = start + len(bad)
            with progress(len(paths), "Classifying images", completed=done, hidden=hide_bar) as show:
                for at in range(0, len(good), size):
                    batch = good[at : at + size]
                    tops = rank_classes(trained, images[batch], top_k, compute_logits)
                    for index, top in zip(batch.tolist(), tops, strict=True):
                        yield Prediction(chunk[index], top)
                    done += len(batch)
                    show(done)


@contextlib.contextmanager
def _faster_on_cpu(model: nn.Module, num_images: int) -> Iterator[None]:
    """Let a model on the CPU predict many images faster."""
    if num_images < _FASTER_FROM or torch.cuda.is_available():
        yield
        return
    keep_freed_memory()  # or the kernel may map and zero the outputs of layers again and again
    with faster_convolutions(model):
        yield


def _logits_in_bfloat16(
    trained: TrainedModel, sample: UInt8[np.ndarray, "n height width channels"], batch_size: int
) -> Logits | None:
    with _memory_for(min(batch_size, NUM_SAMPLED)), torch.inference_mode():
        compute_logits = faster_logits(trained, torch.from_numpy(sample[:NUM_SAMPLED]), batch_size)
    if compute_logits is not None:
        print(
            "computed in bfloat16, and in float32 where two classes are close; --precision 32-true: all in float32",
            file=sys.stderr,
        )
    return compute_logits


def _remark_on_dark_images(paths: Sequence[str], images: np.ndarray, sample: np.ndarray) -> bool:
    """Print a warning if 16-bit images of a sample decode to almost black; return whether they do."""
    if len(sample) == 0:
        return False
    remark = image_decoding.dark_16_bit_remark([paths[index] for index in sample], images[sample])
    if remark:
        print(f"warning: {remark}", file=sys.stderr)
    return bool(remark)


def _decoded(
    paths: Sequence[str], trained: TrainedModel
) -> tuple[np.ndarray, list[image_decoding.Unreadable], image_decoding.Remarks]:
    images = np.empty((len(paths), trained.image_size, trained.image_size, trained.in_channels), np.uint8)
    decode = partial(image_decoding.decode_image, resize=trained.resize, in_channels=trained.in_channels)
    # stdout may be for JSON lines only.
    return images, *image_decoding.decode_all(paths, trained.image_size, images, decode, log=sys.stderr)


# -- output -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _rows(output: Path | None, top_k: int, labels: Mapping[str, str]) -> Iterator[Write]:
    if output is None:
        yield _json_writer(sys.stdout.write, labels, ensure_ascii=True)  # stdout may have any encoding
        sys.stdout.flush()
        return
    # Names of files that are not UTF-8 hold lone surrogates; they become \udcXX, which JSON reads back.
    with replacing(output) as path, open(path, "x", encoding="utf-8", errors="backslashreplace", newline="") as file:
        if output.suffix.lower() == ".csv":
            yield _csv_writer(file, top_k, labels)
        else:
            yield _json_writer(file.write, labels, ensure_ascii=False)


def _csv_writer(file: TextIO, top_k: int, labels: Mapping[str, str]) -> Write:
    writer = csv.writer(file, lineterminator="\n")
    header = ["path", *(["label"] if labels else []), "class", "probability"]
    for rank in range(2, top_k + 1):
        header += [f"class_{rank}", f"probability_{rank}"]
    writer.writerow(header)

    def write(prediction: Prediction) -> None:
        path, ranked = prediction
        label = [csv_cell(labels.get(path, ""))] if labels else []
        writer.writerow([csv_cell(path), *label, *(cell for name, prob in ranked for cell in (csv_cell(name), prob))])

    return write


def _json_writer(write_text: Callable[[str], object], labels: Mapping[str, str], *, ensure_ascii: bool) -> Write:
    def write(prediction: Prediction) -> None:
        path, ranked = prediction
        top = [{"class": name, "probability": prob} for name, prob in ranked]
        label = {"label": labels.get(path)} if labels else {}
        write_text(json.dumps({"path": path, **label, **top[0], "top": top}, ensure_ascii=ensure_ascii) + "\n")

    return write


def _summarize(output: Path, counts: Counter[str], elapsed_s: float) -> None:
    num = counts.total()
    speed = f"{elapsed_s:.1f} s ({num / max(elapsed_s, 1e-9):,.0f} images/s)"
    print(f"{plural(num, 'image')} in {speed}: {printable(str(output))}")
    if counts:
        shown = ", ".join(f"{printable(name)} {count:,}" for name, count in counts.most_common(_MOST_FREQUENT))
        rest = len(counts) - _MOST_FREQUENT
        print(f"Most frequent: {shown}" + (f" and {rest} other class{'' if rest == 1 else 'es'}" if rest > 0 else ""))


def skipped_path(output: Path, force: bool) -> Path:
    """Return where the files without a row are listed: next to `output`, not over the list of a run or another output.

    That is `<output>.skipped_files.jsonl` where it exists or `skipped_files.jsonl` does, else `skipped_files.jsonl`.
    """
    neighbour = RunFolder(output.parent)
    path = neighbour.skipped_files
    own = path.with_name(f"{output.name}.{path.name}")
    is_free = not os.path.lexists(path) or (force and not neighbour.config.exists())
    return path if is_free and not os.path.lexists(own) else own


def _remove_outdated_list(path: Path, found: Sequence[str]) -> None:
    """Remove the list of an earlier output if all of its files now have a row."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # missing, or no such list
        lines = read_bytes(path, _MAX_LIST_BYTES).decode("ascii").splitlines()
        if (listed := {json.loads(line)["path"] for line in lines}) and listed <= {*found}:
            path.unlink()


def _report_skipped(
    unreadable: Sequence[Skipped], skipped: Sequence[Skipped], path: Path | None, num_named: int = _NAMED
) -> None:
    """Print the first images that cannot be read and the number of all; list all files in `path`."""
    named = unreadable[: num_named if path is not None else _NAMED_WITHOUT_LIST]
    for file, reason in named:
        print(printable(f"{file} {reason}"), file=sys.stderr)
    if path is None and len(unreadable) > len(named):
        print(f"and {len(unreadable) - len(named):,} more; --output FILE lists them", file=sys.stderr)
    num = [f"{plural(len(unreadable), 'file')} cannot be read"] * bool(unreadable)
    num += [f"{plural(len(skipped), 'file')} skipped (hidden, or not an image by the suffix)"] * bool(skipped)
    if path is not None and num:
        try:
            write_skipped_files(path, (*unreadable, *skipped))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}).") from error
        print(f"{', '.join(num)}: all listed in {printable(str(path))}", file=sys.stderr)
    elif skipped:
        print(f"{', '.join(num)}; --output FILE lists them", file=sys.stderr)
