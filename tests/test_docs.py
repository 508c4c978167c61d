"""Laws of the documentation: its commands parse and run, its code works, its tables are complete, its links exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import docs_hooks
import pytest
import yaml
from fontTools.ttLib import TTFont

from seq2seq.cli.commands import COMMANDS
from seq2seq.cli.compose import check_job, hydra_session
from seq2seq.cli.help import command_help, examples
from seq2seq.cli.main import parse_arguments
from seq2seq.cli.overrides import expand_sweep, parse_overrides
from seq2seq.config.loading import flatten
from seq2seq.config.paths import CONFIGS, choices
from tests.helpers import REPOSITORY
from tests.helpers.corpora import write_corpus
from tests.helpers.pages import (
    BLOCK,
    anchors,
    blocks,
    commands,
    links,
    menu,
    pages,
    repository_text,
    requests,
    site_text,
)
from tests.helpers.program import Program
from tests.helpers.serving import Web

PAGES = list(pages())
SERVING = "docs/howto/serving.md"
TROUBLES = "docs/reference/troubleshooting.md"
TOOLKITS = "docs/reference/coming-from.md"
STAND_INS = ("docs/reference/commands.md", "docs/reference/configuration.md")  # the site has generated ones

# ------------------------------------------------------------------------------------------ commands and code


@pytest.mark.parametrize("page", [page for page in PAGES if commands(pages()[page], "sh", "bash", "ini")])
def test_every_command_of_a_page_parses(page: str) -> None:
    """Command, groups, keys, types and contradictions, of each job of a sweep."""
    for arguments in commands(pages()[page], "sh", "bash", "ini"):
        command, *rest = arguments
        assert command in COMMANDS, arguments
        if "--help" in rest:
            assert command_help(command, [word for word in rest if not word.startswith("-")])
            continue
        options = parse_arguments(rest)
        with hydra_session():
            overrides = parse_overrides(command, options.overrides, options.multirun)
            jobs = expand_sweep(overrides) if options.multirun else [overrides]
            assert [problem for job in jobs for problem in check_job(command, job)[1]] == [], arguments


def test_every_command_of_the_program_is_shown() -> None:
    assert {words[0] for text in pages().values() for words in commands(text, "sh", "bash")} == set(COMMANDS)


@pytest.mark.usefixtures("small_toy")
def test_every_command_marked_sh_and_the_python_page_run(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the pages; trainings are shortened, and the hub is replaced by a folder in its layout."""
    write_hub_folder(tmp_path)
    for text in pages().values():
        for words in commands(text, "sh"):
            run_shortened(program, words)
    monkeypatch.chdir(tmp_path)
    for page in ("README.md", "docs/howto/python.md", "docs/reference/files.md"):
        for code in blocks(pages()[page], "python"):
            exec(compile(code, page, "exec"), {})


def write_hub_folder(folder: Path) -> None:
    (folder / "FOLDER").mkdir()
    for name, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        pair = [(folder / path).read_text(encoding="utf-8").splitlines() for path in write_corpus(folder, name, 60, 4)]
        rows = [json.dumps({"en": en, "de": de}) for en, de in zip(*pair, strict=True)]
        (folder / "FOLDER" / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")


QUICK = ["training.updates=2", "training.validate_every=2", "model.width=16", "tokenizer.vocabulary=500"]
QUICK += ["training.tokens=300"]


def run_shortened(program: Program, words: list[str]) -> None:
    words = [re.sub(r"training\.updates=\d+", "training.updates=4", word) for word in words]
    given = {word.split("=")[0] for word in words}
    if words[0] == "train":
        words += [quick for quick in QUICK if quick.split("=")[0] not in given]
        words += ["processes=1"] if "processes" not in given else []
    if words[0] in ("train", "evaluate", "compare", "report", "translate", "score"):
        words += ["precision=float32"]  # bfloat16 gains nothing at this size
    if words[0] in ("train", "evaluate", "compare", "report"):
        words += ["search.length_factor=0.5", "search.length_extra=2"]  # two updates teach no end of a sentence
    if words[:2] == ["train", "data=multi30k"] and not any(word.startswith("data.path=") for word in words):
        words += ["data.path=FOLDER"]
    result = program(*words, input="two cat\n")
    assert result.returncode == 0, f"{words}\n{result.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(pages()[page], "python")])
def test_every_python_block_of_a_page_compiles(page: str) -> None:
    for code in blocks(pages()[page], "python"):
        compile(code, page, "exec")


def test_the_kubernetes_file_agrees_with_itself() -> None:
    """Pods find the first one by the name of the Service, as many as torchrun waits for, with as many GPUs."""
    [text] = blocks(pages()["docs/howto/scaling.md"], "yaml")
    service, job = yaml.safe_load_all(text)
    name, spec = service["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    options = dict(word[2:].split("=", 1) for word in container["command"] if word.startswith("--"))
    assert [(part["apiVersion"], part["kind"]) for part in (service, job)] == [("v1", "Service"), ("batch/v1", "Job")]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]} and pod["subdomain"] == name
    assert options["rdzv-endpoint"].split(":")[0] == f"{job['metadata']['name']}-0.{name}"
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "OnFailure"
    assert spec["completions"] == spec["parallelism"] == int(options["nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["nproc-per-node"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    command, *overrides = container["command"][container["command"].index("seq2seq") + 1 :]
    with hydra_session():
        assert check_job(command, parse_overrides(command, overrides, False))[1] == []


def test_the_slurm_script_saves_and_queues_itself_again(tmp_path: Path) -> None:
    """Slurm's commands are stand-ins; the signal reaches the training, and the job waits until it has saved."""
    [script] = [text for text in blocks(pages()["docs/howto/scaling.md"], "bash") if text.startswith("#!")]
    until_signal = 'trap "sleep 0.2; touch saved; exit 1" TERM; echo $$ > id; mv id step; while :; do sleep 0.05; done'
    stand_ins = {
        "srun": f'echo "$@" > srun; {until_signal}',
        "scancel": 'kill -TERM "$(cat step)"',
        "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else ls saved > "$1.$2"; fi',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job").write_text(script, encoding="utf-8")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    with subprocess.Popen(["bash", "job"], cwd=tmp_path, env={**slurm, "PATH": path}) as job:
        while not (tmp_path / "step").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.wait(20)
    assert "--rdzv-id 7 --rdzv-backend c10d --rdzv-endpoint n1:29500" in (tmp_path / "srun").read_text(encoding="utf-8")
    assert (tmp_path / "requeue.7").read_text(encoding="utf-8") == "saved\n", "saved before the job is queued again"


def test_every_documented_request_is_answered() -> None:
    web, shown = Web(), requests(pages()[SERVING])
    for path, data, headers in shown:
        if data:
            form = {} if headers else {"Content-Type": "application/x-www-form-urlencoded"}
            response = web.post(path, content="&".join(data), headers={**headers, **form})
        else:
            response = web.get(path)
        assert response.status_code == 200, f"{path} {response.text}"
        assert '"error"' not in response.text, f"{path} {response.text}"
    routes = {path for path in Web().get("/openapi.json").json()["paths"] if path.startswith("/v1/")}
    assert routes == {path for path, *_ in shown if path.startswith("/v1/")}, "each route is shown"


def test_what_is_open_without_a_key_is_documented() -> None:
    web = Web(api_key="secret")
    open_paths = re.findall(
        r"`(/[\w/]+)`", re.findall(r"Open without a key: (.*?)\.\n", pages()[SERVING], re.DOTALL)[0]
    )
    shown = {path for path, data, _ in requests(pages()[SERVING]) if not data}
    assert {path for path in shown if web.get(path).status_code == 200} <= set(open_paths)
    for path in ("/", *open_paths):
        assert web.get(path).status_code == 200, path


# ------------------------------------------------------------------------------------------ reference

REFERENCE = [*docs_hooks.EXPLAINED.items(), *COMMANDS.items()]


@pytest.mark.parametrize(("file", "cls"), [pytest.param(cls, file, id=cls) for cls, file in REFERENCE])
def test_every_key_has_type_default_and_comment(file: str, cls: type) -> None:
    keys = docs_hooks.keys_of(cls, file)
    values = {key: value for key, value in docs_hooks._values(file).items() if key != "defaults"}
    assert {key.name for key in keys} == set(flatten(values)), "every value of the file, and no other"
    assert [key.name for key in keys if not (key.type and key.comment and key.default.strip("`"))] == []
    assert "mapping" not in {key.type for key in keys if key.name != "extra"}


@cache
def known_keys() -> frozenset[str]:
    """Every dotted key of a group, and what holds it."""
    names = {
        f"{file.partition('/')[0]}.{key.name}"
        for file, cls in docs_hooks.EXPLAINED.items()
        for key in docs_hooks.keys_of(cls, file)
    }
    return frozenset(names | {name.rpartition(".")[0] for name in names})


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/testing.md"])
def test_every_key_that_a_page_names_exists(page: str) -> None:
    text = pages()[page]
    if page == TOOLKITS:  # the other columns name the keys of other programs
        text = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`((?:model|data|tokenizer|optimizer|training|search)\.[a-z_.]+)[`=]", text))
    files = {name for name in named if name.endswith((".safetensors", ".pt", ".model"))} - known_keys()
    assert named - files - known_keys() == set()


def test_reference_pages_of_the_repository_link_every_command_and_group() -> None:
    files = {link.removeprefix("../../configs/") for page in STAND_INS for link in links(repository_text(page) or "")}
    groups = {f"{path.name}/" for path in CONFIGS.iterdir() if path.is_dir()}
    assert {f"{command}.yaml" for command in COMMANDS} | groups <= files


def test_the_reference_names_every_choice_and_command() -> None:
    configuration, commands_ = docs_hooks.configuration_page(), docs_hooks.commands_page()
    for group in (path.name for path in CONFIGS.iterdir() if path.is_dir()):
        for choice in choices(group):
            assert f"{group}={choice}" in configuration
    assert [name for name in COMMANDS if f"## seq2seq {name}\n" not in commands_] == []


@cache
def templates() -> tuple[str, ...]:
    """Every text of the source, with … for its values."""
    found = []
    for path in (REPOSITORY / "seq2seq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def occurs(message: str) -> bool:
    """Whether the source has such a text; the longest part is sought first, which is fast."""
    parts = message.split("…")
    longest, pattern = max(parts, key=len), re.compile(".*".join(map(re.escape, parts)))
    return any(longest in template and pattern.search(template) for template in templates())


def test_every_documented_error_is_in_the_source() -> None:
    """In whole, or after the key that begins it."""
    messages = re.findall(r"^\| `([^`]+)` \|", pages()[TROUBLES], re.MULTILINE)
    assert messages
    wrong = [m for m in messages if not occurs(m) and not (": " in m and occurs(m.partition(": ")[2]))]
    assert wrong == []


# ------------------------------------------------------------------------------------------ links, pictures, code


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_no_link_of_a_page_is_broken(page: str) -> None:
    """Files and anchors, of the repository as GitHub shows it, and of the site, where some pages are generated."""
    for link in links(repository_text(page) or ""):
        path, _, anchor = link.partition("#")
        target = os.path.normpath(PurePosixPath(page).parent / path) if path else page
        for found in (repository_text(target), site_text(target)):
            assert found is not None, f"{page}: {link}"
            assert not anchor or anchor in anchors(found), f"{page}: {link}"


def test_the_readme_states_speeds_of_the_benchmarks() -> None:
    stated = re.findall(r"([\d.]+) times as\s+fast", pages()["README.md"])
    assert stated and [speed for speed in stated if f"{speed} ×" not in pages()["docs/benchmarks.md"]] == []


def test_every_page_is_in_the_menu_once() -> None:
    written = {path.relative_to(docs_hooks.DOCS).as_posix() for path in docs_hooks.DOCS.rglob("*.md")}
    assert sorted(menu()) == sorted(written | set(docs_hooks.generated_pages()))


@pytest.mark.parametrize("page", [page for page in PAGES if docs_hooks.CODE_LINK.search(pages()[page])])
def test_code_from_the_source_is_whole(page: str) -> None:
    for match in docs_hooks.CODE_LINK.finditer(pages()[page]):
        code = docs_hooks.source_of(match["path"], match["name"])
        ast.parse(code)
        assert re.match(rf"(@.*\n)*def {match['name'].rpartition('.')[2]}\(", code)
        assert code in docs_hooks.with_code(pages()[page])
    assert '"code")' not in docs_hooks.with_code(pages()[page])


def test_pictures_are_small_and_used() -> None:
    images = list((docs_hooks.DOCS / "images").iterdir())
    sizes = [path.stat().st_size for path in images]
    assert max(sizes) < 150_000 and sum(sizes) < 1_000_000
    for path in images:
        if path.suffix == ".svg":
            ElementTree.parse(path)
    drawn = {docs_hooks.diagram_file(text) for text in docs_hooks.diagrams()}
    everything = "".join(pages().values())
    unused = {path for path in images if f"images/{path.name}" not in everything}
    assert unused == drawn, "each diagram is drawn as it is written: python scripts/pictures.py --mermaid"


@cache
def every_page() -> dict[str, str]:
    """The pages that are written and those that are generated."""
    return pages() | {f"docs/{path}": text for path, text in docs_hooks.generated_pages().items()}


@pytest.mark.parametrize("page", every_page())
def test_a_page_has_one_title_and_no_heading_skips_a_level(page: str) -> None:
    text = BLOCK.sub("", every_page()[page]).replace("\n::: ", "\n## ")
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert [after for before, after in pairwise(levels) if after > before + 1] == []


@pytest.mark.parametrize("page", PAGES)
def test_pictures_have_a_text_and_lines_of_code_fit(page: str) -> None:
    """The site shows 120 characters of code beside its menus."""
    assert [text for text in re.findall(r"!\[(.*?)\]\(", pages()[page]) if len(text.split()) < 2] == []
    lines = [line for block in BLOCK.finditer(pages()[page]) for line in block["text"].splitlines()]
    assert [line for line in lines if len(line) > 120] == []


def test_every_error_of_the_list_has_a_way_out() -> None:
    rows = re.findall(r"^\| `.+` \|(.*)\|$", pages()[TROUBLES], re.MULTILINE)
    assert rows and all(row.strip() for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_a_command_are_explained_in_one_column(command: str) -> None:
    _, *lines, _ = docs_hooks.examples_block(command).splitlines()
    assert [re.sub(" +# ", "  ", line) for line in lines] == [re.sub("  +", "  ", each) for each in examples(command)]
    assert len({line.index("  # ") + 2 for line in lines if "  # " in line}) == 1


@pytest.mark.parametrize(
    "code", ["--beam 5", "run=[a,b]", "tests/model/test_attention.py::test_of_its_paper", "a &lt; b"]
)
def test_code_keeps_its_text_where_it_may_break(code: str) -> None:
    block = f"<pre><span></span><code>{code}</code></pre>"
    content = docs_hooks.with_whole_words(f"<p><code>{code}</code></p>{block}")
    assert re.sub("</?(span|wbr)[^>]*>", "", content) == re.sub("</?span>", "", f"<p><code>{code}</code></p>{block}")
    assert content.endswith(block)
    unbreakable = re.sub('<span class="whole">.*?</span>', "", content.partition("<pre>")[0])
    assert "-" not in unbreakable and max(map(len, re.split(r"<wbr>| |<.*?>", unbreakable))) <= docs_hooks.LONGEST_WHOLE


def test_formulas_of_one_line_may_stand_below_one_another() -> None:
    content = docs_hooks.with_mathml(r'<div class="arithmatex">\[\operatorname{score} = -\infty \qquad c_t\]</div>')
    first, second = re.findall("<math.*?</math>", content)
    assert "<mi>score</mi>" in first and "<mi>&#x0221E;</mi>" in first and "<msub>" in second


def test_the_font_of_the_formulas_has_their_characters() -> None:
    """python scripts/pictures.py --font"""
    font = TTFont(docs_hooks.DOCS / "fonts" / "math.woff")
    missing = [
        sign for sign in docs_hooks.formula_characters() if not sign.isspace() and ord(sign) not in font.getBestCmap()
    ]
    assert missing == [] and "MATH" in font


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/concepts/")])
def test_a_concept_has_a_formula_its_code_and_a_picture(page: str) -> None:
    text = pages()[page]
    assert "$$" in text and docs_hooks.CODE_LINK.search(text)
    assert re.search(r"!\[[^]]+ [^]]+\]\(\.\./images/", text)


def test_every_test_that_a_promise_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", pages()["docs/promises.md"])
    assert named
    for path, name in named:
        assert f"def {name or 'test_'}" in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path}::{name}"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    if not importlib.util.find_spec("mkdocs"):
        pytest.skip("needs MkDocs: pip install -e '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert len(html) > len(menu())
    for path, text in html.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?(?:https?:)?//", text)
        loaded += re.findall(r"<link(?![^>]*canonical)[^>]* href=\"?(?:https?:)?//", text)
        assert not loaded and "arithmatex" not in text, path
    assert "<math" in html[tmp_path / "site" / "concepts" / "attention.html"]
