"""Tables, charts and `REPORT.md` say what the profile says, and no more."""

from __future__ import annotations

import copy
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from made_profile import INT4, INT8, REFERENCE, made_profile

from qquant.errors import InputError
from qquant.profile_report import render_markdown, render_text, write_reports
from qquant.reporting import accuracy, png, running, svg
from qquant.reporting.charts import Mark, Panel, charts
from qquant.reporting.figures import Table, interval_of, markdown_text, pair, percent, verdict
from qquant.reporting.glance import glance, sentences
from qquant.reporting.schema import checked, known, read_profile


def texts(table: Table) -> dict[str, list[str]]:
    """Rows by their first cell."""
    return {row[0]: row[1:] for row in table.texts()}


def panel(found: dict[str, Any], chart: str, title: str) -> Panel:
    drawn = {c.name: c for c in charts(found)}[chart]
    return next(p for p in drawn.panels if p.title.startswith(title))


def test_accuracy_has_the_shape_of_qwens_table() -> None:
    table = accuracy.task_scores(made_profile(2))
    assert table.head == ("model", "MMLU", "C-Eval (val)", "GSM8K", "HumanEval")
    assert [row[0] for row in table.texts()] == [REFERENCE, INT8, INT4]
    figures = [cell.split(" ± ")[0] for cell in texts(table)[INT4]]
    assert figures == ["55.1", "59.2", "49.7", "29.9"]
    assert texts(table)[REFERENCE][0] == "55.8 ± 0.4"
    assert "MMLU: acc, 0-shot, preset qwen, chat template, 14042 questions" in table.notes[1]


def test_scores_measured_unlike_are_called_out() -> None:
    found = made_profile(2)
    found["models"][INT4]["tasks"]["mmlu"]["shots"] = 5
    notes = " ".join(accuracy.task_scores(found).notes)
    assert "MMLU was not measured alike" in notes and "GSM8K was not" not in notes


def test_speed_and_memory_have_the_shape_of_qwens_tables() -> None:
    found = made_profile(2)
    speed, memory = running.speed_qwen(found), running.memory(found)
    assert speed.head == ("model", "1 + 2048", "1 + 8192", "2048 + 1", "kernel")
    assert texts(speed)[INT4] == ["50.09", "43.58", "16.70", "torch-int4"]
    assert memory.head == ("model", "weights", "encode 2048", "generate 8192")
    assert texts(memory)[REFERENCE] == ["14.38", "16.99", "22.48"]


def test_perplexity_over_lengths_has_the_shape_of_qwens_table() -> None:
    (table,) = accuracy.long_context(made_profile(2))
    assert table.head[2:] == ("1024", "2048", "4096", "8192", "16384", "32768")
    first, second = table.texts()[:2]
    assert first[:3] == [REFERENCE, "neither", "4.34 ± 0.05"]
    assert second[:3] == [REFERENCE, "dynamic_ntk + logn", "4.23 ± 0.05"]


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.1, 0.5), "worse"),
        ((-0.1, 0.5), "not told from noise"),
        ((-0.5, -0.1), "better"),
        ((0.0, 0.0), "the same"),
        ((0.0, 0.5), "not told from noise"),
        (None, ""),
    ],
)
def test_a_loss_is_told_from_noise_by_its_interval(
    interval: tuple[float, float] | None, words: str
) -> None:
    assert verdict(interval) == words


def test_an_interval_that_is_not_given_follows_from_the_error() -> None:
    assert interval_of([1.0, 0.5], None) == pytest.approx((0.02, 1.98), abs=1e-3)
    assert interval_of([1.0, 0.5], [0.4, 1.2]) == (0.4, 1.2)
    assert interval_of([1.0, None], None) is None


def test_losses_are_said_in_words_everywhere() -> None:
    found = made_profile(2)
    rows = {(r[0], r[1]): r[2:] for r in accuracy.task_losses(found).texts()}
    assert rows[INT4, "HumanEval"][0].startswith("7.30 ±")
    assert rows[INT4, "HumanEval"][2] == "worse" and rows[INT8, "MMLU"][2] == "not told from noise"
    assert any(
        s.startswith(f"{INT8}, compared with {REFERENCE}: not told from noise on MMLU")
        and s.endswith("worse on GSM8K.")
        for s in sentences(found)
    )
    marks = panel(found, "accuracy", f"{INT4}: points lost").marks
    assert [m.text.split(", ")[1] for m in marks] == [
        *("worse", "not told from noise", "not told from noise", "worse")
    ]
    assert [m.loud for m in marks] == [True, False, False, True]


def test_a_slow_kernel_is_called_out_everywhere() -> None:
    found = made_profile(2)
    why = "Int8 is dequantized at every call"
    assert any(INT8 in s and why in s for s in sentences(found))
    assert texts(running.sizes(found))[INT8][-1] == f"slow: {why}"
    slow = [m.label for m in panel(found, "speed", "qwen-1-2048").marks if m.loud]
    assert slow == [f"{INT8} (slow kernel)"]
    assert why in render_markdown(found)


def test_small_errors_keep_their_digits() -> None:
    assert pair([4.36e-05, 1.6e-06], 5).text == "0.0000436 ± 0.0000016"
    assert pair([0.00594, 0.00016], 5).text == "0.00594 ± 0.00016"
    assert pair([0.0, 0.0], 5).text == "0.00000 ± 0.00000"
    assert percent([0.9958, 0.00002]).text == "99.5800 ± 0.0020%"


def test_words_stand_to_the_left_and_empty_columns_are_left_out() -> None:
    found = made_profile(2)
    for entry in found["models"].values():
        entry["load"]["method"] = None
        for row in entry["memory"].values():
            row["allocator_peak_bytes"] = None
    tables = {table.id: table for table in running.tables(found)}
    head = ("model", "files", "weights in memory", "kernel", "called out")
    assert tables["sizes"].head == head
    assert tables["sizes"].markdown().splitlines()[1] == "| --- | ---: | ---: | --- | --- |"
    assert "allocator" not in tables["memory-full"].head
    line = tables["sizes"].text().splitlines()[0]
    assert line.index("kernel") == tables["sizes"].text().splitlines()[-1].index("torch-int4")


def test_an_interval_of_a_share_ends_where_shares_do() -> None:
    found = made_profile(2)
    for entry in found["models"].values():
        entry["tasks"]["mmlu"]["score"] = [0.4, 0.245]
    for mark in panel(found, "accuracy", "MMLU, points").marks:
        assert mark.low == 0 and mark.high == pytest.approx(88, abs=0.1)


def test_what_was_not_measured_is_left_out() -> None:
    found = made_profile(2)
    for entry in found["models"].values():
        for part in ("tasks", "layers", "long_context", "speed"):
            entry.pop(part, None)
    assert "task score" not in glance(found).head
    assert {t.id for t in accuracy.tables(found)} == {
        *("text-0", "text-1", "position-0", "position-1")
    }
    assert [c.name for c in charts(found)] == ["accuracy", "memory"]
    report = render_markdown(found)
    assert "Speed" not in report.replace("Speed, Qwen", "") or "Size and kernels" in report
    bare = {"format": 2, "protocol": {}, "machine": {}, "models": {"m": {}}}
    assert charts(bare) == [] and "| m |" in render_markdown(checked(bare))


def test_bars_begin_at_zero_and_whiskers_are_95_percent() -> None:
    found = made_profile(2)
    shown = panel(found, "accuracy", "MMLU")
    assert shown.form == "bars" and shown.span()[0] == 0
    score, error = found["models"][INT4]["tasks"]["mmlu"]["score"]
    mark = shown.marks[2]
    assert mark.label == INT4 and mark.value == pytest.approx(100 * score)
    assert mark.high is not None and mark.low is not None
    assert mark.high - mark.low == pytest.approx(2 * 196 * error, rel=1e-3)
    assert all(m.quiet == (m.label == REFERENCE) for m in shown.marks)


def damaged(found: dict[str, Any], linear: str) -> dict[str, Any]:
    """Doubled scales: the weight is twice what it should be, an error of 100%."""
    found = copy.deepcopy(found)
    found["models"][INT4]["layers"]["linears"][linear]["relative_error"] = 1.02
    return found


def bars(drawn: str) -> list[tuple[str, float, float]]:
    """`(label, value, height)` of each column of an SVG."""
    pattern = r'data-label="([^"]*)" data-value="([^"]*)".*?class="bar"[^>]* height="([^"]*)"'
    return [(n, float(v), float(h)) for n, v, h in re.findall(pattern, drawn)]


def test_a_layer_with_doubled_scales_is_the_visible_maximum() -> None:
    linear = "transformer.h.1.mlp.w1"
    found = damaged(made_profile(4), linear)
    shown = panel(found, "layers", INT4)
    tallest = max(shown.marks, key=lambda m: m.value)
    assert tallest.label == linear and tallest.value == pytest.approx(102)
    assert [m.label for m in shown.marks if m.loud] == [linear]
    assert shown.note == f"Largest: {linear}, 102.00%."
    drawn = bars(svg.draw(shown))
    assert [name for name, _, _ in drawn] == list(found["models"][INT4]["layers"]["linears"])
    heights = sorted((h, name) for name, _, h in drawn)
    assert heights[-1][1] == linear and heights[-1][0] > 3 * heights[-2][0]
    for _, value, height in drawn:  # a length is a ratio
        assert height / heights[-1][0] == pytest.approx(value / tallest.value, abs=0.01)
    assert f"`{linear}`" in render_markdown(found).replace(markdown_text(linear), f"`{linear}`")


def test_svg_bars_are_as_long_as_their_values() -> None:
    marks = (Mark("a<b", 10.0, 8.0, 12.0, "10"), Mark("b", 5.0, text="5", quiet=True))
    drawn = svg.draw(Panel("t", "bars", marks))
    lengths = [float(w) for w in re.findall(r'class="bar"[^>]* width="([^"]*)"', drawn)]
    assert lengths == [300.0, 150.0]  # of 360, which is 12
    assert 'data-low="8.0" data-high="12.0"' in drawn and "a&lt;b" in drawn and "a<b" not in drawn


def test_blocks_are_named_below_the_columns() -> None:
    assert panel(made_profile(3), "layers", INT4).ticks == ((0, "0"), (5, "1"), (10, "2"))
    assert len(panel(made_profile(80), "layers", INT4).ticks) <= 12


def pixels(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG file, whose first chunk must be whole."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    length, kind = struct.unpack(">I4s", content[8:16])
    assert kind == b"IHDR"
    (crc,) = struct.unpack(">I", content[16 + length : 20 + length])
    assert crc == zlib.crc32(content[12 : 16 + length])
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.skipif(not png.available(), reason="needs the extra `plots`")
def test_reports_are_written_with_their_pictures(tmp_path: Path) -> None:
    found = made_profile(2)
    found["models"]["$x$ 通义 <b>"] = found["models"].pop(INT4)  # no formula, no warning
    written = {path.name for path in write_reports(tmp_path, checked(found))}
    pictures = {"accuracy.png", "speed.png", "memory.png", "layers.png"}
    assert written == pictures | {"REPORT.md", "report.html"}
    report = (tmp_path / "REPORT.md").read_text()
    assert set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", report)) == pictures
    first = {name: (tmp_path / name).read_bytes() for name in written}
    for name in pictures:
        width, height = pixels(first[name])
        assert width > 600 and height > 150
    assert not list(tmp_path.glob(".*"))
    again = next(c for c in charts(found) if c.name == "memory")
    assert png.draw(again) == first["memory.png"]  # the same profile, the same bytes
    assert render_markdown(found, sorted(n.removesuffix(".png") for n in pictures)) == report


def test_without_matplotlib_the_report_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(png, "available", lambda: False)
    written = {path.name for path in write_reports(tmp_path, made_profile(2))}
    assert written == {"REPORT.md", "report.html"} and "qquant[plots]" in caplog.text
    report = (tmp_path / "REPORT.md").read_text()
    assert "qquant[plots]" in report and "![" not in report


def test_markdown_names_cannot_break_a_table() -> None:
    found = made_profile(2)
    found["models"]["a|b\n`c` <i>"] = found["models"].pop(INT4)
    lines = [line for line in render_markdown(found).splitlines() if r"a\|b \`c\` \<i\>" in line]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert lines and all(w > 2 for w in widths)
    table = accuracy.task_scores(found).markdown().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:5]}) == 1


def test_the_terminal_gets_the_summary_and_what_was_lost() -> None:
    text = render_text(made_profile(2))
    assert text.splitlines()[0].split()[:2] == ["model", "files"]
    assert "not told from noise" in text and "Text: wiki.txt" in text
    assert max(map(len, text.splitlines())) < 250


def test_the_report_has_protocol_machine_and_command() -> None:
    found = made_profile(2)
    found["commands"] = ["qquant profile A --against B"]
    found["failed"] = [{"model": INT4, "part": "speed", "error": "out of memory"}]
    report = render_markdown(found)
    assert "- seqlen: 512\n" in report and "- seed of qwen sampling: 1024\n" in report
    assert "- driver: 560.35" in report
    assert "- version of torch: 2.13.0" in report
    assert "```sh\nqquant profile A --against B\n```" in report
    assert f"- {INT4}: speed: out of memory" in report.replace("\\", "")


def test_an_identical_copy_is_the_same_and_not_noise() -> None:
    found = made_profile(2)
    for got in found["models"][INT8]["accuracy"]["domains"].values():
        got |= {"kl": [0.0, 0.0], "top1": [1.0, 0.0], "nll_lost": [0.0, 0.0]}
        got |= {"nll_lost_interval": [0.0, 0.0]}
    row = texts(next(accuracy.distribution(found)))[INT8]
    assert row[3:6] == ["the same", "0.00000 ± 0.00000", "100.00 ± 0.00%"]
    assert any(s.startswith(INT8) and "exactly the same on wiki.txt" in s for s in sentences(found))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("format",), 1, "format 1"),
        (("models",), [], "models"),
        (("models", INT4), 3, INT4),
        (("models", INT4, "accuracy", "domains", "wiki.txt", "kl"), [1], "wiki.txt.kl"),
        (("models", INT4, "accuracy", "domains", "wiki.txt", "kl"), "0.1", "wiki.txt.kl"),
        (("models", INT4, "tasks", "mmlu", "score"), [0.1, "x"], "mmlu.score"),
        (("models", INT4, "load", "file_bytes"), True, "load.file_bytes"),
        (("models", INT4, "speed", "qwen-1-2048", "runs"), [1], r"runs\[0\]"),
        (("models", INT4, "load", "file_bytes"), 10**300, "load.file_bytes"),
        (("models", INT4, "tasks", "mmlu", "subjects"), [["a"]], "mmlu.subjects"),
        (("machine", "versions"), {"torch": 2}, "versions.torch"),
        (("reference",), 1, "reference"),
        (("seeds", "qwen_sampling"), "1024", "seeds.qwen_sampling"),
    ],
)
def test_a_profile_of_another_shape_is_refused_by_name(
    tmp_path: Path, path: tuple[str, ...], value: object, named: str
) -> None:
    found = made_profile(2)
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "profile.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=named):
        read_profile(tmp_path / "profile.json")


@pytest.mark.parametrize(
    "text",
    [
        *("", "[1]", '{"format": 2', '{"format": NaN}', "\udcff", "[" * 9999),
        '{"format": 2, "models": {}, "machine": {}, "protocol": {"x": 1e999}}',
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"p\.json"):
        read_profile(tmp_path / "p.json")
    with pytest.raises(InputError, match=r"none\.json"):
        read_profile(tmp_path / "none.json")


def test_what_was_not_finite_is_left_empty() -> None:
    found = made_profile(2)
    wiki = found["models"][INT4]["accuracy"]["domains"]["wiki.txt"]
    wiki |= {"perplexity": [None, None], "kl": [None, None], "nll_lost_interval": [None, None]}
    found["models"][INT4]["tasks"]["mmlu"]["score"] = [None, None]
    speed = found["models"][INT4]["speed"]["modern-b1-c512-n64"]
    speed |= {"decode_tokens_per_s": None, "decode_range": None, "inter_token_ms": None}
    shown = known(checked(found))
    row = texts(next(accuracy.distribution(shown)))[INT4]
    assert row[0] == "" and row[4] == "" and row[1] != ""
    assert texts(accuracy.task_scores(shown))[INT4][0] == ""
    assert [m.label for m in panel(shown, "accuracy", "MMLU").marks] == [REFERENCE, INT8]
    assert "nan" not in render_markdown(found).lower() and "None" not in render_markdown(found)
    assert "nan" not in render_text(found).lower()


def test_remarks_and_ranges_of_a_measurement_are_shown() -> None:
    found = made_profile(2)
    setting = found["models"][INT4]["speed"]["modern-b1-c512-n64"]
    setting |= {"decode_range": [50.0, 60.0], "notes": ["longer than it was trained for"]}
    setting |= {"slow_kernel": "no compiler here"}
    table = running.speed(found)
    assert any("(50.00 to 60.00)" in c.text for row in table.rows for c in row)
    (row,) = [r for r in running.latency(found).texts() if r[:2] == [INT4, "modern-b1-c512-n64"]]
    inter = setting["inter_token_ms"]
    assert row[2:] == [f"{inter[key]:.2f}" for key in ("p50", "p90", "p99", "max")]
    assert f"{INT4}, modern-b1-c512-n64: longer than it was trained for." in table.notes
    assert any(INT4 in s and "no compiler here" in s for s in sentences(found))
    assert [m.label for m in panel(found, "speed", "modern-b1-c512-n64:").marks if m.loud] == [
        *(f"{INT8} (slow kernel)", f"{INT4} (slow kernel)")
    ]


def test_qwens_rows_are_not_among_those_that_were_warmed_up() -> None:
    shown = {row[1] for row in running.speed(made_profile(2)).texts()}
    assert shown and not any(setting.startswith("qwen") for setting in shown)


def test_a_peak_that_the_system_did_not_tell_is_not_the_weights() -> None:
    found = made_profile(2)
    rows = found["models"][INT4]["memory"]
    for row in rows.values():
        row["peak_bytes"] = None
    table = running.memory(known(found))
    cells = dict(zip(table.head, {r[0]: r for r in table.texts()}[INT4], strict=True))
    assert cells["weights"] and not cells["encode 2048"] and not cells["generate 8192"]
    assert running.peak_of(rows["encode-2048"]) is None


def test_a_metric_that_is_no_share_is_not_in_points() -> None:
    found = made_profile(2)
    for model, score in ((REFERENCE, 3.6), (INT8, -0.02), (INT4, 112.0)):
        task = found["models"][model]["tasks"].pop("gsm8k")
        task |= {"metric": "likelihood_diff", "score": [score, 0.1]}
        task |= {"lost": [3.6 - score, 0.1], "lost_interval": None} if "lost" in task else {}
        found["models"][model]["tasks"]["crows"] = task
    scores = accuracy.task_scores(found)
    assert texts(scores)[REFERENCE][scores.head.index("crows") - 1] == "3.6 ± 0.1"
    assert scores.notes[0] == "Points out of 100, other metrics as they are ± standard error."
    losses = accuracy.task_losses(found)
    assert losses.head[2] == "lost" and "own unit" in losses.notes[0]
    assert panel(found, "accuracy", "crows").title == "crows"
    marks = panel(found, "accuracy", f"{INT4}: points lost").marks
    assert "crows" not in [mark.label for mark in marks]
    for chart in charts(found):
        assert png.draw(chart).startswith(b"\x89PNG")


def test_odd_figures_are_drawn_all_the_same() -> None:
    """A share beyond its ends, an error below zero, intervals that do not hold their value, a time
    of nothing, ends that are not known."""
    found = made_profile(2)
    tasks, speed = found["models"][INT4]["tasks"], found["models"][INT4]["speed"]
    tasks["mmlu"] |= {"score": [1.3, 0.2]}
    tasks["gsm8k"] |= {"score": [0.4, -0.2], "lost": [0.1, 0.01], "lost_interval": [0.2, 0.3]}
    setting = speed["modern-b1-c512-n64"]
    setting |= {"decode_range": [99.0, None]}
    setting["runs"] = [{"decode_s": 1e-320}, {"decode_s": 1.0}]
    speed["modern-b1-c512-n64-compile"] |= {"decode_range": [1.0, 2.0]}
    shown = known(checked(found))
    assert "None" not in render_markdown(found)
    for chart in charts(shown):
        assert png.draw(chart).startswith(b"\x89PNG")


def test_a_newer_profile_can_be_read(tmp_path: Path) -> None:
    found = made_profile(2) | {"future": {"x": [1]}}
    found["models"][INT4]["telepathy"] = {"key": "k"}
    (tmp_path / "profile.json").write_text(json.dumps(found))
    assert read_profile(tmp_path / "profile.json") == found
