"""The pages: made from the sources, nothing is missing on them, and they work in a browser."""

import ast
import html
import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]
import equations  # noqa: E402  (the path comes first)
import examples  # noqa: E402

LIBRARIES = re.search(r"docs = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
PAGES = ["lm", "sft", "reward", "ppo", "judge", "rlhf_minimal", "toy", "tldr"]
LATEX = {name: latex for row in equations.MAP for name, latex in row["functions"].items()} | {
    name: latex for name, (_, latex) in equations.OTHERS.items()}


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def test_the_table_names_functions_and_tests_that_exist():
    for name in {*LATEX, *equations.PENCIL_TESTS}:
        node = ast.parse(source(name.split(".")[0]))
        for part in name.split(".")[1:]:
            found = [sub for sub in node.body if getattr(sub, "name", "") == part]
            assert found, f"docs/equations.py: no {name}"
            node = found[0]
    for test in equations.PENCIL_TESTS.values():
        assert test in examples.tests(), f"docs/equations.py: no {test} in tests/"
    for row in equations.MAP:
        assert (ROOT / "tests" / row["test"]).exists(), row["test"]
        assert row.get("of", next(iter(row["functions"]))) in row["functions"]


def test_every_symbol_stands_in_an_equation_and_in_the_code():
    assert set(re.findall(r"<(\w+)>", "".join(LATEX.values()))) == set(equations.SYMBOLS)
    words = set(re.findall(r"\w+", "".join(map(source, PAGES)))) | set(PAGES)
    for key, (_, _, _, names) in equations.SYMBOLS.items():
        gone = [name for name in names.split() if not set(name.split(".")) <= words]
        assert not gone, f"docs/equations.py: {key} is no longer called {gone} in the code"


# ------------------------------------------------------------------------------- the pages


@pytest.fixture(scope="module")
def built():
    """All files as `python docs/build.py` would write them. Other versions of the libraries write
    other HTML, so that a comparison with what is committed takes exactly those of the extra."""
    for name, version in re.findall(r'"([\w-]+)==([\d.]+)"', LIBRARIES):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "none"
        if installed != version:
            pytest.skip(f"the pages were not built: {name} is {installed}, not {version}; "
                        "pip install -e '.[docs]'")
    import build

    assert build.PAGES == PAGES
    return build.build()


def plain(fragment):
    return html.unescape(re.sub("<[^>]+>", "", fragment))


def section_of(page, function):
    (section,) = [part for part in page.split("<section>") if f'<h3 id="{function}"' in part]
    return section.split("</section>")[0]


def test_the_committed_files_are_fresh(built):
    stale = [name for name, text in built.items()
             if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != text]
    assert not stale, f"run `python docs/build.py` and commit {stale}"


@pytest.mark.parametrize("name", PAGES)
def test_nothing_of_a_file_is_missing_on_its_page(built, name):
    tree, lines = ast.parse(source(name)), source(name).split("\n")
    words = [ast.get_docstring(tree)]
    if name != "rlhf_minimal":  # what `python ppo.py` prints stands with the functions
        end = tree.body[-1].lineno - 1 if isinstance(tree.body[-1], ast.If) else len(lines)
        lines = lines[:end]
    nested = {sub for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
              for sub in ast.walk(node) if sub is not node}
    for i in range(tree.body[0].end_lineno):
        lines[i] = ""
    for node in ast.walk(tree):
        if (isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node not in nested
                and ast.get_docstring(node)):
            words.append(ast.get_docstring(node))
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = ""
    words += [line.strip(" #-") for line in lines if line.strip().startswith("#")]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    page = re.sub(r'(?s)<div class="pencil">.*?</div>', "", built[f"docs/{name}.html"])
    shown = plain("\n".join(re.findall("(?s)<pre>(?!<code>)(.*?)</pre>", page))).split("\n")
    assert [line for line in shown if line.strip() and not line.strip().startswith("#")] == code

    said = re.sub(r"\W+", " ", plain(page))
    for text in words:  # what it raises stands below the rest of a docstring
        for part in re.split(r"(?<=[.:)])\s|\n\n", text):
            assert re.sub(r"\W+", " ", part).strip() in said, part


@pytest.mark.parametrize("name", PAGES)
def test_a_symbol_of_an_equation_is_in_the_code_too(built, name):
    page = built[f"docs/{name}.html"]
    own = re.sub(r'(?s)<div class="note step">.*?</figure></div>|id="symbols".*', "", page)
    equation, own = (set(re.findall(r'<mrow class="sym" data-sym="(\w+)"', text))
                     for text in (page, own))
    code = set(re.findall(r'<span class="sym" data-sym="(\w+)"', page))
    assert own <= code, f"nothing lights up with {own - code}"
    assert sorted(re.findall(r'<li id="meaning-(\w+)"', page)) == sorted(equation | code)


def test_the_blocks_of_the_loop_stand_beside_their_equations(built):
    for function, steps in (
            ("rollout", ["lm.html#sample", "lm.html#get_response_mask",
                         "lm.html#response_log_probs", "ppo.html#response_values",
                         "reward.html#RewardModel.score", "ppo.html#penalize_missing_eos",
                         "ppo.html#kl_penalized_rewards", "ppo.html#compute_gae",
                         "ppo.html#whiten"]),
            ("train_ppo", ["lm.html#linear_schedule", "ppo.html#rollout",
                           "lm.html#response_log_probs", "ppo.html#policy_loss",
                           "ppo.html#response_values", "ppo.html#value_loss"])):
        section = section_of(built["docs/ppo.html"], function)
        found = re.findall(r'<a href="([\w.]+#[\w.]+)">[\w.]+</a></figcaption>', section)
        assert found == steps


def test_a_section_is_a_function_whole_and_nothing_else(built):
    judge = section_of(built["docs/judge.html"], "reward_model_judge")
    assert "def judge(" in plain(judge), "a nested function stays in the one around it"
    remark = "a comment between two functions"
    import build
    source = build.Source("judge")
    after = [last for name, _, _, last in source.sections if name == "JudgeConfig"][0]
    source.comments[after + 1], source.lines[after] = remark, f"# {remark}"
    html = [build.section(source, *one, None) for one in source.sections]
    (said,) = [text for text in html if remark in text]
    assert "<h3" not in said.split(remark)[0], "a comment below a class belongs to no function"
    checks = re.findall("(?s)<details.*?</details>", section_of(built["docs/ppo.html"], "whiten")
                        + section_of(built["docs/ppo.html"], "policy_loss"))
    assert "check_shapes" in plain("".join(checks)), "guard clauses are folded"


def test_every_link_leads_somewhere(built):
    for name, page in built.items():
        for target, anchor in re.findall(r'href="([\w.]+\.html)?(#[\w.]+)?"', page):
            there = built[f"docs/{target}" if target else name]
            assert not anchor or f'id="{anchor[1:]}"' in there, f"{name}: {target}{anchor}"


def test_a_pencil_example_has_its_numbers(built):
    for function, numbers in (("kl_penalized_rewards", "[[-0.01, 0.025, 1.975, 0]]"),
                              ("compute_gae", "[[1.72044, 1.71625, 1.675, 0]]"),
                              ("policy_loss", "policy loss: -0.32 clip fraction: 0.4"),
                              ("value_loss", "value loss: 0.616667 clip fraction: 0.333333")):
        section = section_of(built["docs/ppo.html"], function)
        (printed,) = re.findall("<samp>(.*?)</samp>", section)
        assert numbers in printed, f"{function}: its own example and no other"


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: the pages were "
                                   "not opened in a browser")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium: the pages were not opened in a browser")
    with sync_api.sync_playwright() as playwright:
        # without a sandbox, which root may not have; nothing but our own files is opened
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, request):
    """A function that opens a page with the network off; what it asks for or complains of fails."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme,
                                  offline=True)
    page, asked, complaints = context.new_page(), [], []
    page.on("request", lambda asking: asked.append(asking.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def visit(name):
        asked.clear()
        page.goto((DOCS / f"{name}.html").as_uri())
        return page

    yield visit
    assert len(asked) == 1 and not complaints, (asked, complaints)
    context.close()


def at(*windows):
    return pytest.mark.parametrize("visit", windows, indirect=True,
                                   ids=[f"{width} {scheme}" for width, scheme in windows])


@pytest.mark.slow
@at((390, "dark"), (1280, "light"), (1400, "dark"), (1920, "light"))
@pytest.mark.parametrize("name", ["index", *PAGES])
def test_a_page_is_laid_out(visit, name):
    page = visit(name)
    sizes = page.evaluate("[...document.querySelectorAll('math, math *:not(mspace)')].map(part => "
                          "[part.getBoundingClientRect().width > 0, part.outerHTML])")
    assert not [part for wide, part in sizes if not wide]
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window, "the page itself never scrolls sideways"
    parts = ".formula" if window < 1000 else ".formula, .body pre"
    clipped = page.evaluate(f"[...document.querySelectorAll('{parts}')].filter(part => "
                            "part.scrollWidth > part.clientWidth).map(part => part.textContent)")
    assert not clipped, f"wider than the column: {clipped}"
    size, gap = page.evaluate(
        "[Math.min(99, ...[...document.querySelectorAll('.body pre')].map(pre => "
        "parseFloat(getComputedStyle(pre).fontSize))), Math.max(0, ...["
        "...document.querySelectorAll('.body > pre')].map(pre => pre.clientHeight - 1.6 * "
        "parseFloat(getComputedStyle(pre).fontSize) * pre.textContent.split('\\n').length))]")
    assert size >= (13 if window > 1000 else 12) and gap < 2, "code is no higher than its lines"
    (red, *_), (ink, *_) = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(colour => colour.match(/\\d+/g).map(Number))")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (red < 64 and ink > 192) if dark else (red > 192 and ink < 64)


@at((390, "light"), (1280, "dark"))
def test_the_code_of_a_function_is_one_block(visit):
    edges = visit("ppo").evaluate(
        "[...document.querySelectorAll('#train_ppo + .body > :is(pre, .say, .guard)')].map(part => "
        "part.getBoundingClientRect()).map(box => [box.top, box.bottom])")
    assert len(edges) > 10
    assert all(abs(below[0] - above[1]) < 1 for above, below in zip(edges, edges[1:]))
    widths = visit("ppo").evaluate(
        "[...document.querySelectorAll('#train_ppo + .body > pre')].map(pre => pre.scrollWidth)")
    assert len(set(widths)) == 1, "and scrolls as one"


def lit(page):
    """Kinds of places that are lit, and what the line at the foot says."""
    keys = page.evaluate("[...document.querySelectorAll('.lit')].map(it => it.dataset.sym)")
    kinds = page.evaluate("[...new Set([...document.querySelectorAll('.lit')]"
                          ".map(it => it.closest('math') ? 'equation' : 'code'))]")
    return set(keys), set(kinds), page.locator("#bar").inner_text()


@at((390, "dark"), (1400, "light"))
def test_a_symbol_lights_up_on_both_sides(visit):
    page = visit("ppo")
    assert lit(page) == (set(), set(), "")
    for side in ("mrow", "span"):
        page.locator(f"section {side}[data-sym=kl_beta]").first.click()
        keys, kinds, says = lit(page)
        assert (keys, kinds) == ({"kl_beta"}, {"equation", "code"})
        assert "weight of the KL penalty" in says and "reward per nat" in says
        places = page.locator("section [data-sym=kl_beta]").count()
        assert page.locator(".lit").count() == places and f"{places} places" in says
        page.keyboard.press("Escape")
        assert lit(page) == (set(), set(), "")
    page.locator("section span[data-sym=lam]").nth(2).click()  # not one that takes the focus
    assert lit(page)[:2] == ({"lam"}, {"equation", "code"})
    page.locator("h1").click()
    assert not lit(page)[0], "a click elsewhere puts it out"


@at((1400, "light"))
def test_a_symbol_lights_up_by_keyboard(visit):
    page = visit("ppo")
    page.evaluate("document.querySelector('#kl_penalized_rewards a').focus()")
    seen = []
    for _ in range(10):
        page.keyboard.press("Tab")
        keys, kinds, _ = lit(page)
        assert len(keys) == 1 and kinds == {"equation", "code"}
        seen += keys
    assert seen[:5] == ["rewards", "scores", "kl_beta", "policy", "reference"], "as in the equation"
    assert "kl_beta" in seen[5:], "and then in the code"
