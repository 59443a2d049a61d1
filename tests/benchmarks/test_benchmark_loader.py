"""The loader's benchmark refuses a peer that it does not know, and compares finished epochs."""

import argparse
import json

import pytest
import torch
from program import REPO, start

from benchmarks.speed.loader import (
    AIRBENCH_BEGIN,
    AIRBENCH_CHANGES,
    AIRBENCH_END,
    AIRBENCH_FILE,
    BATCH_SIZE,
    airbench_loader_text,
    check,
    compare,
)
from benchmarks.speed.peers import peer_of
from cifar_lightning.errors import UserError

# What the benchmark looks for in a checkout, without the rest.
LOADER = "class InfiniteCifarLoader:\n" + "".join(f"    {line}\n" for line in AIRBENCH_CHANGES)


def write_checkout(path, loader, begin=AIRBENCH_BEGIN):
    (path / AIRBENCH_FILE).write_text(f"top.cuda()\n{begin}\n{loader}{AIRBENCH_END}\nmain.cuda()\n", encoding="utf-8")
    return path


def test_the_peer_is_changed_for_a_cpu_and_nothing_else_of_its_file_runs(tmp_path):
    text = airbench_loader_text(write_checkout(tmp_path, LOADER))
    assert text.split("\n")[1:-1] == [LOADER.split("\n")[0], *(f"    {line}" for line in AIRBENCH_CHANGES.values())]


@pytest.mark.parametrize(
    ("loader", "begin"),
    [
        (LOADER.replace(".half()", ".bfloat16()"), AIRBENCH_BEGIN),
        (LOADER.replace("Infinite", ""), AIRBENCH_BEGIN),
        (LOADER + "    more.cuda()\n", AIRBENCH_BEGIN),
        (LOADER * 2, AIRBENCH_BEGIN),
        (LOADER, "# another heading"),
    ],
)
def test_another_version_of_the_peer_is_refused(tmp_path, loader, begin):
    with pytest.raises(UserError, match="another version"):
        airbench_loader_text(write_checkout(tmp_path, loader, begin))


def test_a_missing_peer_is_one_line_and_exit_status_2(tmp_path):
    peer = f"airbench={tmp_path / 'nowhere'}"
    done = start("benchmarks.speed.loader", "--peer", peer, program="-m", cwd=REPO, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("text", ["airbench", "airbench=", "ffcv=folder"])
def test_a_peer_is_a_known_name_and_a_folder(text):
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=DIR with a NAME of airbench"):
        peer_of(["airbench"])(text)


def test_an_epoch_that_lacks_a_batch_or_a_square_is_not_compared():
    finished = torch.ones(BATCH_SIZE, 3, 32, 32)
    finished[:, :, :12, :12] = 0
    ways = {"ours": lambda: [finished] * 2, "peer": lambda: [finished] * 2}
    assert {len(rates) for rates in compare(ways, 2, rounds=3).values()} == {3}
    with pytest.raises(AssertionError, match="peer"):
        compare(ways | {"peer": lambda: [finished]}, 2, rounds=1)
    spoiled = finished.clone()
    spoiled[7, 0, 5, 5] = 0.1
    with pytest.raises(AssertionError, match="without its square"):
        check("peer", [spoiled, finished], 2)


@pytest.mark.slow
def test_the_last_line_is_the_ratio_of_the_json(tmp_path):
    settings = ["--num", 1000, "--rounds", 1, "--json", tmp_path / "figures.json"]
    done = start("benchmarks.speed.loader", *settings, program="-m", cwd=REPO)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    ours, peer = (figures["images_per_s"][name][0] for name in ("ours", "torchvision"))
    assert done.stdout.splitlines()[-1] == f"ratio={ours / peer:.1f}"
