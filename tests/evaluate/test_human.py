"""Answers, votes and the web server of ratings by people, without a browser."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.core.errors import UserError
from fastgpt.data.tokenizer import train_tokenizer
from fastgpt.evaluate.human import answers, command
from fastgpt.evaluate.human.answers import Question, read_prompts
from fastgpt.evaluate.human.files import append, read
from fastgpt.evaluate.human.ratings import Pair, Ratings, read_ratings
from fastgpt.evaluate.human.server import BODY, Server
from fastgpt.evaluate.target import Target
from fastgpt.inference import terminal
from fastgpt.inference.chat import Template
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT

PAIRS = [Pair(f"p{i}", f"Question {i}?", f"left {i}", f"right {i}") for i in range(12)]
NAMES = ("secret-one", "secret-two")


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read(path)]


@pytest.fixture
def ratings(tmp_path: Path) -> Ratings:
    return Ratings(tmp_path / "ratings.jsonl", PAIRS, NAMES, seed=3)


@pytest.fixture
def server(ratings: Ratings) -> Iterator[Server]:
    with Server(ratings, "token") as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, Any, http.client.HTTPResponse]:
    """Return status, content and response of a request; a body is sent as JSON unless it is bytes."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)  # type: ignore[arg-type]
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = (
        {}
        if body is None
        else {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    )
    connection.request("GET" if body is None else "POST", path, data, sent)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(content) if is_json else content.decode(), response


def vote(server: Server, place: int, choice: str = "first", rater: str = "ann", **more: Any) -> int:
    row = {"rater": rater, "place": place, "choice": choice, "seconds": 1.5, **more}
    return ask(server, "/token/vote", row)[0]


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    for name in ("", "page.css", "page.js"):
        status, text, response = ask(server, f"/token/{name}")
        assert status == 200 and "http://" not in text and "https://" not in text and "innerHTML" not in text
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    page = ask(server, "/token/")[1]
    assert "<style" not in page and "onclick=" not in page  # the policy would refuse them


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/wrong/", "/wrong/pair?rater=ann", "/token", "/token/x", "/token/../x"]
)
def test_nothing_without_the_token(server: Server, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_the_browser_gets_no_name_of_a_model(server: Server) -> None:
    seen = []
    for place in range(len(PAIRS)):
        status, pair, _ = ask(server, f"/token/pair?rater=ann&place={place}")
        assert status == 200 and set(pair) == {"done", "total", "place", "prompt", "first", "second", "vote"}
        assert "secret" not in json.dumps(pair)
        seen.append((pair["prompt"][0]["content"], pair["first"].split()[0]))
    assert sorted(q for q, _ in seen) == sorted(str(p.prompt) for p in PAIRS)
    assert {side for _, side in seen} == {"left", "right"}


def test_raters_see_other_orders_which_a_restart_keeps(ratings: Ratings) -> None:
    def seen(found: Ratings, rater: str) -> list[tuple[str, str]]:
        return [(p.id, found.sides(rater, p)) for p in found.order(rater)]

    again = Ratings(ratings.path, PAIRS, NAMES, seed=3)
    assert seen(ratings, "ann") == seen(again, "ann") != seen(ratings, "bob")
    assert seen(ratings, "ann") != seen(Ratings(ratings.path, PAIRS, NAMES, seed=4), "ann")
    sides = [ratings.sides(f"rater {i}", p) for i in range(100) for p in PAIRS]
    assert abs(sides.count("ab") - 600) < 5 * 300**0.5


def test_a_vote_is_written_with_the_true_sides(server: Server, ratings: Ratings) -> None:
    for place, choice in enumerate(["first", "second", "tie", "both_bad", "first", "second"]):
        pair = ask(server, "/token/pair?rater=ann")[1]
        assert (pair["place"], pair["done"]) == (place, place)
        assert vote(server, place, choice, comment="why é\u2028") == 200
        row = rows(ratings.path)[-1]
        shown = {"first": pair["first"], "second": pair["second"]}
        if choice in shown:
            assert row[row["winner"]] == shown[choice]
        else:
            assert row["winner"] == choice
        assert row[row["order"][0]] == pair["first"] and row["comment"] == "why é\u2028" and row["seconds"] == 1.5
        assert (row["a_model"], row["b_model"], row["rater"]) == (*NAMES, "ann") and row["date"].endswith("+00:00")
        assert row["a"].startswith("left") and row["prompt"] == pair["prompt"][0]["content"]
    assert ask(server, "/token/pair?rater=bob")[1]["done"] == 0


def test_a_later_vote_replaces_an_earlier_one(server: Server, ratings: Ratings) -> None:
    assert vote(server, 0, "first") == vote(server, 0, "tie", comment="no") == 200
    pair = ask(server, "/token/pair?rater=ann&place=0")[1]
    assert pair["vote"] == {"choice": "tie", "comment": "no"} and pair["done"] == 1
    assert len(rows(ratings.path)) == 2
    assert [r["winner"] for r in read_ratings(ratings.path)] == ["tie"]


def test_votes_survive_a_restart(server: Server, ratings: Ratings) -> None:
    for place in range(len(PAIRS)):
        assert vote(server, place, "second") == 200
    assert ask(server, "/token/pair?rater=ann")[1] == {"done": 12, "total": 12, "place": None}
    with open(ratings.path, "a") as f:
        f.write('{"id": "p1", "wi')  # the machine stopped while it wrote
    again = Ratings(ratings.path, PAIRS, NAMES, seed=3)
    assert again.done("ann") == 12 and again.next_place("ann") is None
    assert again.shown("ann", 5)["vote"] == {"choice": "second", "comment": ""}
    again.vote("bob", 0, "tie", 1, "")
    assert len(rows(ratings.path)) == 13
    other = Ratings(ratings.path, [Pair("p0", "Question 0?", "left 0", "changed")], NAMES, seed=3)
    assert other.done("ann") == 0  # votes on other answers do not count


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"choice": "a"}, 400),
        ({"place": 12}, 400),
        ({"place": -1}, 400),
        ({"place": True}, 400),
        ({"place": "x"}, 400),
        ({"place": None}, 400),
        ({"seconds": -1}, 400),
        ({"seconds": "1"}, 400),
        ({"comment": "x" * 4001}, 400),
        ({"comment": 3}, 400),
        ({"rater": ""}, 400),
        ({"rater": "a\nb"}, 400),
        ({"rater": "x" * 61}, 400),
        ({"rater": ["ann"]}, 400),
    ],
)
def test_bad_votes(server: Server, ratings: Ratings, changes: dict[str, Any], status: int) -> None:
    row = {"rater": "ann", "place": 0, "choice": "first", "seconds": 1.0, **changes}
    got, content, _ = ask(server, "/token/vote", row)
    assert got == status and content["error"]
    assert not ratings.path.exists()


def test_bad_bodies(server: Server, ratings: Ratings) -> None:
    assert ask(server, "/token/vote", b"{")[0] == ask(server, "/token/vote", [1])[0] == 400
    assert ask(server, "/token/vote", b"[" * 50_000)[0] == 400
    assert ask(server, "/token/vote", {}, Content_Type="text/plain")[0] == 415  # what a form of another page can send
    assert ask(server, "/token/vote", b"x" * (BODY + 1))[0] == 413
    assert ask(server, "/token/vote", b"{}", Content_Length="-1")[0] == 411
    assert ask(server, "/wrong/vote", {})[0] == ask(server, "/token/pair", {})[0] == 404
    assert not ratings.path.exists()


def test_a_vote_that_cannot_be_written_is_not_counted(server: Server, ratings: Ratings) -> None:
    ratings.path.mkdir()
    status, content, _ = ask(server, "/token/vote", {"rater": "ann", "place": 0, "choice": "tie", "seconds": 1})
    assert status == 500 and "The vote could not be written" in content["error"]
    assert ratings.done("ann") == 0


def test_only_those_on_the_list_rate(server: Server) -> None:
    server.raters = ("ann", "bob")
    assert ask(server, "/token/raters")[1] == {"raters": ["ann", "bob"]}
    assert ask(server, "/token/pair?rater=ann")[0] == 200 and ask(server, "/token/pair?rater=eve")[0] == 403


def test_votes_at_the_same_time_are_all_written(server: Server, ratings: Ratings) -> None:
    threads = [threading.Thread(target=vote, args=(server, i, "tie", f"rater {i}")) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(rows(ratings.path)) == 12


def test_a_browser_that_leaves_is_no_error(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    import socket
    import struct

    for _ in range(3):
        with socket.create_connection(server.server_address[:2]) as s:  # type: ignore[arg-type]
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
            s.sendall(b"GET /token/page.js HTTP/1.0\r\n\r\n")
    assert ask(server, "/token/")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_port_in_use(server: Server, ratings: Ratings) -> None:
    port = server.server_address[1]
    with pytest.raises(UserError, match=f"cannot serve on 127.0.0.1, port {port} .*expected a free --port"):
        Server(ratings, "token", port=port)


def test_append_ends_the_last_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for left, kept in (('{"a": 1}\n{"b', 1), ('{"a": 1}\n{"b": 2}', 2)):
        file.write_text(left)
        append(file, {"c": 3})
        assert len(rows(file)) == kept + 1 and rows(file)[-1] == {"c": 3}


def opened(path: str, fingerprint: str = "f", chat: bool = True) -> Target:
    """Return a tiny random model, which depends on its path."""
    tokenizer = train_tokenizer(["the cat sat on the mat, and the dog saw it. "] * 4, 300)
    config = ModelConfig(n_layers=1, n_heads=2, width=16, vocab_size=tokenizer.n_vocab, block_size=64, init_std=0.5)
    model = GPT(config, generator=torch.Generator().manual_seed(len(path))).eval()
    return Target(model, tokenizer, path, Path(path), {"fingerprint": fingerprint}, Template() if chat else None)


def options(*words: str) -> Any:
    from fastgpt.core.command import Parser

    parser = Parser()
    terminal.add_options(parser, "")
    return parser.parse_args(["--tokens", "6", *words])


def generated(path: str, questions: list[Question], cache: Path, args: Any) -> answers.Answers:
    return answers.Generation(path, questions, cache, args).run()


QUESTIONS = [
    Question("1", "the cat"),
    Question("2", [{"role": "user", "content": "the dog"}]),
    Question("3", "and"),
]


def test_answers_are_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "open_target", lambda path, device: opened(path))
    cache = tmp_path / "r.a.jsonl"
    first = generated("model", QUESTIONS, cache, options())
    assert len(first.texts) == 3 and [r["model"] for r in rows(cache)] == ["model"] * 3
    assert {r["seed"] for r in rows(cache)} and rows(cache)[0]["settings"]["tokens"] == 6
    kept = cache.read_text().splitlines()
    cache.write_text("\n".join(kept[:2]) + "\n" + kept[2][:20])  # stopped while it wrote the third
    assert generated("model", QUESTIONS, cache, options()).texts == first.texts
    assert len(rows(cache)) == 3
    monkeypatch.setattr(answers, "generator_of", None)  # nothing is generated any more
    assert generated("model", QUESTIONS, cache, options()).texts == first.texts
    with pytest.raises(TypeError):
        generated("model", QUESTIONS, cache, options("--seed", "1"))
    monkeypatch.setattr(answers, "open_target", lambda path, device: opened(path, "other weights"))
    with pytest.raises(TypeError):
        generated("model", QUESTIONS, cache, options())


@pytest.mark.parametrize(
    ("prompt", "chat", "message"),
    [
        ([{"role": "user", "content": "hi"}], False, "prompt 7 is a conversation and model has no chat template"),
        ("the " * 200, True, "prompt 7 has .* tokens for model, expected 1 to 64"),
        ([{"role": "user", "content": "<|endoftext|>"}], True, "prompt 7 contains"),
    ],
)
def test_prompts_that_a_model_cannot_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: Any, chat: bool, message: str
) -> None:
    monkeypatch.setattr(answers, "open_target", lambda path, device: opened(path, chat=chat))
    with pytest.raises(UserError, match=message):
        generated("model", [QUESTIONS[0], Question("7", prompt)], tmp_path / "c.jsonl", options())
    assert not (tmp_path / "c.jsonl").exists()


def test_prompts(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\ntwo\n")
    jsonl.write_text('{"prompt": "one", "id": 5}\n{"prompt": [{"role": "user", "content": "x", "more": 1}]}\n')
    assert [q.prompt for q in read_prompts(text)] == ["one", "two"]
    assert [q.id for q in read_prompts(jsonl)][0] == "5"
    assert read_prompts(jsonl)[1].prompt == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts, expected one or more"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2: prompt is nothing, expected a text or a list of messages"),
        ('{"prompt": []}\n', r"line 1: prompt is \[\], expected"),
        ("x\n", "line 1: got 'x', expected a JSON object"),
        ('{"prompt": "a"}\n{"prompt": "a"}\n', "line 2 has the id of line 1"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "a", "id": 2}\n', "line 2 has the prompt of line 1"),
    ],
)
def test_bad_prompts(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(file)


def written(path: Path, model: str, texts: dict[str, str]) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "answer": t, "model": model}) + "\n" for p, t in texts.items()))
    return str(path)


def test_command_with_files_of_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a = written(tmp_path / "a.jsonl", "one", {"x": "1", "y": "2", "same": "s", "alone": "z"})
    b = written(tmp_path / "b.jsonl", "two", {"x": "3", "y": "4", "same": "s"})
    served: list[Ratings] = []

    def serve(server: Server) -> None:
        served.append(server.ratings)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", serve)
    assert command.main([a, b]) == 0
    assert [p.prompt for p in served[0].pairs] == ["x", "y"] and served[0].names == ("one", "two")
    text = capsys.readouterr().out
    assert (
        "1 answer left out: the other file has none" in text and "1 prompt left out: both answers are the same" in text
    )
    assert "2 pairs to rate: http://127.0.0.1:" in text
    assert command.main([a, b, "--n", "1"]) == 0 and len(served[1].pairs) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.jsonl", "a.jsonl"], "A and B are both a.jsonl"),
        (["a.jsonl", "b.jsonl", "--tokens", "3"], "--tokens has no effect: A and B are files of answers"),
        (["a.jsonl", "b.jsonl", "--prompts", "p.txt"], "a.jsonl has no answer|one has no answer to prompt"),
        (["a.jsonl", "c.jsonl"], "have no prompt in common"),
        (["a.jsonl", "a2.jsonl"], "are both of one, expected two models"),
        (["a.jsonl", "d.jsonl"], "both models give the same answers"),
        (["a.jsonl", "run"], "--prompts is missing"),
        (["a.jsonl", "b.jsonl", "--raters", "Ann", "x" * 61], "--raters has 'xxx"),
        (["a.jsonl", "p.txt"], "p.txt, line 1: got 'new', expected a JSON object"),
    ],
)
def test_bad_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name, model, texts in (
        ("a", "one", {"x": "1"}),
        ("a2", "one", {"x": "2"}),
        ("b", "two", {"x": "2"}),
        ("c", "two", {"y": "2"}),
        ("d", "two", {"x": "1"}),
    ):
        written(tmp_path / f"{name}.jsonl", model, texts)
    (tmp_path / "p.txt").write_text("new\n")
    with pytest.raises(UserError, match=message):
        command.main(words)


def test_nothing_is_generated_if_the_second_model_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("the cat\n")
    real = answers.open_target
    monkeypatch.setattr(answers, "open_target", lambda p, device: opened(p) if p == "a" else real(p, device=device))
    with pytest.raises(UserError, match="b is not a folder"):
        command.main(["a", "b", "--prompts", "p.txt"])
    assert not list(tmp_path.glob("*.jsonl"))
