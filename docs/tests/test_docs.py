"""The page: it is made from the sources, nothing is missing on it, and it works in a browser."""

import ast
import html
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TAUGHT = ["lm", "sft", "reward", "ppo", "judge"]
LIBRARIES = re.search(r"docs = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]


def load(name):
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


equations = load("equations")


def names_in(path):
    """Functions, classes and methods of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{sub.name}" for sub in node.body
                      if isinstance(sub, ast.FunctionDef)}
    return names


def test_the_map_in_the_readme_is_the_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [line for line in equations.readme_map().split("\n") if line not in readme]
    assert not missing, f"change docs/equations.py and run `python docs/build.py`: {missing}"
    assert equations.readme_map() in readme


def test_the_table_names_functions_and_tests_that_exist():
    functions = {name for row in equations.MAP for name in row["functions"]}
    functions |= set(equations.OTHERS) | set(equations.PENCIL_TESTS)
    for name in functions:
        module, function = name.split(".", 1)
        assert function in names_in(ROOT / f"{module}.py"), f"docs/equations.py: no {name}"
    tests = [where.split("::") for where in equations.PENCIL_TESTS.values()]
    for path, test in tests:
        assert test in names_in(ROOT / "tests" / path), f"docs/equations.py: no {test} in {path}"
    for row in equations.MAP:
        assert (ROOT / "tests" / row["test"]).exists(), row["test"]
        assert row.get("of", next(iter(row["functions"]))) in row["functions"]


def test_every_symbol_stands_in_an_equation_and_in_the_code():
    latex = [line for row in equations.MAP for line in row["functions"].values()]
    latex += [line for _, line in equations.OTHERS.values()]
    assert set(re.findall(r"<(\w+)>", "".join(latex))) == set(equations.SYMBOLS)
    code = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in TAUGHT)
    words = set(re.findall(r"\w+", code))
    for key, (_, _, _, names) in equations.SYMBOLS.items():
        gone = [name for name in names.split() if not set(name.split(".")) <= words | set(TAUGHT)]
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
    path = list(sys.path)
    try:
        return load("build").build()
    finally:
        sys.path[:] = path


def test_the_committed_pages_are_fresh(built):
    stale = [name for name, text in built.items()
             if (ROOT / name).read_text(encoding="utf-8") != text]
    assert not stale, f"run `python docs/build.py` and commit {stale}"


def plain(fragment):
    return html.unescape(re.sub("<[^>]+>", "", fragment))


@pytest.mark.parametrize("name", TAUGHT)
def test_nothing_of_a_file_is_missing_on_its_page(built, name):
    page = built[f"docs/{name}.html"]
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    *body, main = ast.parse(source).body
    lines, words = source.split("\n")[: main.lineno - 1], [ast.get_docstring(ast.parse(source))]
    documented = ast.Module, ast.FunctionDef, ast.ClassDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            words.append(ast.get_docstring(node))
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = ""
    words += [line.strip(" #-") for line in lines if line.strip().startswith("#")]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    rows = [row for row in re.split(r'(?=<div class="row)|<details>', page)
            if not row.startswith('<div class="row pencil">')]
    shown = "\n".join(plain(pre) for row in rows
                      for pre in re.findall("(?s)<pre>(?!<code>)(.*?)</pre>", row))
    assert [line for line in shown.split("\n") if line.strip()] == code

    said = re.sub(r"\W+", " ", plain(page))
    words = [re.sub(r"\W+", " ", re.sub(r"^\d\. ", "", text)) for text in words]  # 1. is <li>
    missing = [text for text in words if text.strip() not in said]
    assert not missing, missing


@pytest.mark.parametrize("name", TAUGHT)
def test_a_symbol_of_an_equation_is_in_the_code_too(built, name):
    page = built[f"docs/{name}.html"]
    equation = set(re.findall(r'<mrow class="sym" data-sym="(\w+)"', page))
    code = set(re.findall(r'<span class="sym" data-sym="(\w+)"', page))
    assert equation and equation <= code, f"nothing lights up with {equation - code}"
    explained = re.findall(r'<li id="meaning-(\w+)"', page)
    assert sorted(explained) == sorted(equation | code)


def test_the_blocks_of_the_loop_stand_beside_their_equations(built):
    page = built["docs/ppo.html"]
    for function, steps in (
            ("rollout", ["lm.html#sample_responses", "lm.html#get_response_mask",
                         "lm.html#response_log_probs", "ppo.html#response_values",
                         "reward.html#final_scores", "ppo.html#penalize_missing_eos",
                         "ppo.html#kl_penalized_rewards", "ppo.html#compute_gae"]),
            ("train_ppo", ["ppo.html#other_networks", "lm.html#linear_schedule",
                           "ppo.html#rollout", "ppo.html#whiten_batch",
                           "lm.html#response_log_probs", "ppo.html#policy_loss",
                           "ppo.html#response_values", "ppo.html#value_loss"])):
        (section,) = [part for part in page.split("<section>") if f'<h3 id="{function}"' in part]
        assert re.findall(r'<a href="(\w+\.html#\w+)">\w+</a></figcaption>', section) == steps


def test_a_pencil_example_has_its_numbers(built):
    page = built["docs/ppo.html"]
    for function, numbers in (("kl_penalized_rewards", "[[-0.01, 0.025, 1.975, 0]]"),
                              ("compute_gae", "[[1.72044, 1.71625, 1.675, 0]]"),
                              ("policy_loss", "policy loss: -0.32 clip fraction: 0.4"),
                              ("value_loss", "value loss: 0.616667 clip fraction: 0.333333")):
        (section,) = [part for part in page.split("<section>") if f'<h3 id="{function}"' in part]
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


@pytest.fixture(params=[(1400, "light"), (390, "dark")], ids=["1400 light", "390 dark"])
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
        page.goto((ROOT / "docs" / f"{name}.html").as_uri())
        assert asked == [page.url] and not complaints
        return page

    yield visit
    assert len(asked) == 1 and not complaints, (asked, complaints)
    context.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", *TAUGHT])
def test_a_page_is_laid_out(visit, name):
    page = visit(name)
    sizes = page.evaluate("[...document.querySelectorAll('math, math *:not(mspace)')].map(part => "
                          "[part.getBoundingClientRect().width > 0, part.outerHTML])")
    assert len(sizes) > 20 and not [part for wide, part in sizes if not wide]
    wide = page.evaluate("[...document.querySelectorAll('.formula')].filter(formula => "
                         "formula.scrollWidth > formula.clientWidth).map(it => it.textContent)")
    assert not wide, f"wider than the column: {wide}"
    over = page.evaluate("[...document.querySelectorAll('mfrac')].every(part => part.children[0]"
                         ".getBoundingClientRect().bottom <= part.children[1]"
                         ".getBoundingClientRect().bottom)")
    assert over, "a numerator stands over its denominator"
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window, "the page itself never scrolls sideways"
    (red, *_), (ink, *_) = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(colour => colour.match(/\\d+/g).map(Number))")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (red < 64 and ink > 192) if dark else (red > 192 and ink < 64)


def lit(page):
    """Kinds of places that are lit, and what the line at the foot says."""
    keys = page.evaluate("[...document.querySelectorAll('.lit')].map(it => it.dataset.sym)")
    kinds = page.evaluate("[...new Set([...document.querySelectorAll('.lit')]"
                          ".map(it => it.closest('math') ? 'equation' : 'code'))]")
    return set(keys), set(kinds), page.locator("#bar").inner_text()


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


def test_a_symbol_lights_up_by_keyboard(visit):
    page = visit("ppo")
    page.evaluate("document.querySelector('#kl_penalized_rewards a').focus()")
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        keys, kinds, _ = lit(page)
        assert len(keys) == 1 and kinds == {"equation", "code"}
        seen += keys
    assert seen[:5] == ["rewards", "scores", "kl_beta", "policy", "reference"], "as in the equation"
    assert "kl_beta" in seen[5:], "and then in the code"
