"""The paper's equations beside our words and the code: `python docs/build.py`.

Writes index.html, a page for each file of the plain house, and map.md, all beside this file. They
are made from the sources: functions, docstrings and comments by `ast` and `tokenize`, equations and
symbols from equations.py, the numbers of the pencil examples from examples.py, the picture of the
loop from loop.svg. Each page is one file and asks for nothing over a network.
"""

import ast
import io
import re
import sys
import tokenize
from html import escape
from itertools import groupby
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES, Name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import equations  # noqa: E402  (the path comes first)
import examples  # noqa: E402

PAGES = ["lm", "sft", "reward", "ppo", "judge", "rlhf_minimal", "toy", "tldr"]  # order of reading
SECTION = re.compile(r"\b(?:[34]\.[1-4]|[A-H]\.\d|(?<=App\. )[A-H])\b(?![.\d])")  # of the paper
FORMULAS = {name: (row["paper"], latex) for row in equations.MAP
            for name, latex in row["functions"].items() if latex} | equations.OTHERS
METHODS = {name.split(".")[2]: name for name in FORMULAS if name.count(".") == 2}
PENCILS = {row.get("of", next(iter(row["functions"]))): row["pencil"] for row in equations.MAP}
KEYS = {name: key for key, symbol in equations.SYMBOLS.items() for name in symbol[3].split()}
LINKS = {}  # "sft.py", "sft.train_sft", "train_sft" -> its place on the pages; build() fills it


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- words and equations


def mark(key, inner, tag, focus):
    """A place of a symbol, in an equation or in code, which page.js lights."""
    stop = ' tabindex="0" role="button"' if focus else ""
    return f'<{tag} class="sym" data-sym="{key}"{stop}>{inner}</{tag}>'


def mathml(latex, display="inline", focus=True):
    """LaTeX with <symbols> -> MathML. Each symbol goes through the converter as a letter of its own
    (of Unicode's private area), and is put in afterwards."""
    keys = list(equations.SYMBOLS)
    latex = re.sub(r"<(\w+)>", lambda m: chr(0xE000 + keys.index(m[1])), latex)
    formula = convert(latex, display=display)
    assert "\\" not in formula, f"latex2mathml does not know a command of {latex}"
    thin = '<mspace width="0.17em"></mspace>'  # around a function's name, as TeX has it
    formula = re.sub("<mi>(log|exp)</mi>", rf"<mrow>{thin}<mi>\1</mi>{thin}</mrow>", formula)

    def symbol(match):
        key = keys[ord(match[1]) - 0xE000]
        inner = re.sub("</?math[^>]*>", "", convert(equations.SYMBOLS[key][0]))
        return mark(key, inner, "mrow", focus)

    return re.sub("<mi>([\ue000-\uf8ff])</mi>", symbol, formula)


def lines_of(latex):
    return "".join(f'<div class="formula">{mathml(line, "block")}</div>'
                   for line in latex.split("\n"))


def equation(name, link=False):
    """The equation of a function, with the section of the paper."""
    paper, latex = FORMULAS[name]
    source = f'<a href="{LINKS[name]}">{name.split(".", 1)[1]}</a>' if link else ""
    return f'<figure>{lines_of(latex)}<figcaption>{place(paper)} {source}</figcaption></figure>'


def place(paper):
    """A section of the paper, or what else a formula goes back to."""
    sign = "§ " if re.match(r"\d|[A-H]\b", paper) else ""
    return f'<span class="paper">{sign}{paper or "not in the paper"}</span> '


def words(text):
    """A docstring or comments -> HTML; a file or a function in backticks becomes a link."""
    html = MarkdownIt("commonmark", {"html": False}).render(text)
    return re.sub(r"<code>([\w.]+)</code>", lambda m: f'<a href="{LINKS[m[1]]}">{m[0]}</a>'
                  if m[1] in LINKS else m[0], html)


# ---------------------------------------------------------------------------- one file


def colour(source, scopes, module):
    """Source -> its lines as HTML, in which every symbol is marked. scopes: the function around
    each line. A reader with a keyboard stops at a symbol's first place in each function."""
    lines, line, before, seen = [], "", ["", ""], set()
    for kind, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens(source):
        for i, part in enumerate(text.split("\n")):
            if i:
                lines.append(line)
                line = ""
            scope = scopes[len(lines)] if len(lines) < len(scopes) else ""
            owner = before[0] if before[1] == "." else ""
            names = [f"{scope.split('.')[-1]}.{part}", f"{module}.{part}", part]
            if owner.isidentifier() and owner != "self":  # optimizer.step is no step
                names = [f"{owner}.{part}", part]
            key = next((KEYS[name] for name in names if name in KEYS), None)
            if key and kind in Name and not (owner and len(part) == 1):  # weights.T is no T
                line += mark(key, escape(part), "span", (scope, key) not in seen)
                seen.add((scope, key))
            elif part:
                css = STANDARD_TYPES.get(kind, "")
                line += f'<span class="{css}">{escape(part)}</span>' if css[:1] in tuple("kscm") \
                    else escape(part)
        before = [before[1], text] if text.strip() else before
    return lines + [line]


def start(node):
    """The first line of a function or class, its decorators included."""
    return min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])


def is_guard(node):
    """Does a statement do nothing but refuse what was handed in?"""
    match node:
        case (ast.Expr(value=ast.Call(func=ast.Name(id=name)))
              | ast.Assign(value=ast.Call(func=ast.Name(id=name)))):
            return name in ("check_shapes", "check_mask", "check_finite")
        case ast.If(body=[ast.Raise()], orelse=[]):
            return True
        case ast.For(body=[*others, last]):
            return is_guard(last) and all(isinstance(one, ast.Assign) for one in others)
    return False


class Source:
    """A file, read once: its tree, its lines as text and as HTML, its comments, its sections."""

    def __init__(self, module):
        self.module, self.text = module, read(f"{module}.py")
        self.tree, self.lines = ast.parse(self.text), self.text.split("\n")
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        self.comments = {token.start[0]: token.string[1:].removeprefix(" ") for token in tokens
                         if token.type == tokenize.COMMENT
                         and not self.lines[token.start[0] - 1][: token.start[1]].strip()}
        body = self.tree.body[1:]  # without the docstring
        imported = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.imports = body[0].lineno, imported[-1].end_lineno
        self.example, end = [], len(self.lines)  # what the file prints, where it prints something
        if isinstance(body[-1], ast.If) and "print" in examples.ids(body[-1], ast.Load):
            self.example, end = body[-1].body, body[-1].lineno - 1
        self.sections = []  # (name, or "" between functions; node or None; first line, last line)
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.add("", None, start(node) - 1)
                inner = [sub for sub in node.body if isinstance(sub, ast.FunctionDef)
                         and isinstance(node, ast.ClassDef)]  # methods: what is nested stays inside
                self.add(node.name, node, start(inner[0]) - 1 if inner else node.end_lineno)
                for sub in inner:
                    self.add(f"{node.name}.{sub.name}", sub, sub.end_lineno)
        self.add("", None, end)
        self.functions = {name: node for name, node, _, _ in self.sections if name}
        self.home = {alias.name: node.module for node in imported
                     if isinstance(node, ast.ImportFrom) for alias in node.names}
        self.home |= {name: module for name in self.functions}
        self.calls = self.calls_in()
        scopes = [name for name, _, first, last in self.sections for _ in range(first, last + 1)]
        self.html = colour(self.text, [""] * self.imports[1] + scopes, module)

    def add(self, name, node, last):
        first = self.sections[-1][3] + 1 if self.sections else self.imports[1] + 1
        self.sections.append((name, node, first, last))

    def calls_in(self):
        """Where the names of our functions stand: [(line, column, full name)], in their order."""
        found = []
        for node in ast.walk(self.tree):
            match node:
                case ast.Name(id=name, ctx=ast.Load()) if name in self.home:
                    found.append((node.lineno, node.col_offset, f"{self.home[name]}.{name}"))
                case ast.Attribute(attr=name) if name in METHODS:
                    found.append((node.lineno, node.col_offset, METHODS[name]))
                case ast.Attribute(value=ast.Name(id=module), attr=name):
                    found.append((node.lineno, node.col_offset, f"{module}.{name}"))
        return sorted(found)

    def code(self, numbers):
        return "\n".join(self.html[i - 1] for i in numbers).strip("\n")

    def pieces(self, node, first, last):
        """Lines -> [(kind, their numbers)]: "code", "say" (comments), "heading" or "guard"."""
        doc, folded = (), set()
        if node and ast.get_docstring(node):
            end = node.body[0].end_lineno  # and a blank line after it
            doc = range(node.body[0].lineno, end + 1 + (not self.lines[end].strip()))
        if node and not node.name.startswith("check_"):  # where to refuse is what it is for
            for sub in ast.walk(node):
                if is_guard(sub):
                    folded |= set(range(sub.lineno, sub.end_lineno + 1))

        def kind(i):
            comment = self.comments.get(i)
            return ("guard" if i in folded else "code" if comment is None
                    else "heading" if comment.startswith("-----") else "say")

        groups = groupby((i for i in range(first, last + 1) if i not in doc), kind)
        groups = [(name, list(numbers)) for name, numbers in groups]
        return [(name, numbers) for name, numbers in groups
                if any(self.lines[i - 1].strip() for i in numbers)]


def docstring(source, name, node):
    """What stands beside a function: its equation, its docstring, and small what it refuses."""
    full, text, refuses = f"{source.module}.{name}", ast.get_docstring(node) or "", ""
    html = equation(full) if full in FORMULAS else ""
    html += "".join(place(ref) for ref in dict.fromkeys(SECTION.findall(text)) if ref not in html)
    if not node.name.startswith("check_"):
        sentence = r"(?sm)(?:(?<=[.:)]\s)|^)(?:Raises\s+)?\w+Error\b.*?\.(?=\s|$)"
        refuses = words(" ".join(re.findall(sentence, text)))
        text = re.sub(sentence, "", text)
    html += words(re.sub(r"(?m)^( {4}\S.*?) {4,}(?=\S)", r"\1\n    ", text))  # 2 formulas in a line
    html += f'<div class="raises">{refuses}</div>' if refuses else ""
    return f'<div class="note">{html}</div>' if html else ""


def section(source, name, node, first, last, example):
    """A function: beside its code the equation, the docstring, and equations of the steps that it
    calls; its comments stand where they stand in the file; below are its numbers."""
    html, waiting, shown = [], [], {f"{source.module}.{name}"}
    for kind, numbers in source.pieces(node, first, last):
        indent = len(source.lines[numbers[0] - 1]) - len(source.lines[numbers[0] - 1].lstrip())
        if kind == "heading":
            heading = source.comments[numbers[0]].strip("- ")
            html.append(f'</div></section><h2>{escape(heading)}</h2><section><div class="body">')
        elif kind == "say":
            said = "\n".join(source.comments[i] for i in numbers)
            said = words(re.sub(r"(?m)^(\d+)\. ", r"\1\\. ", said))  # no list
            waiting.append(f'<div class="say" style="padding-left:{indent}ch">{said}</div>')
        elif kind == "guard":
            lines = f"{len(numbers)} line" + "s" * (len(numbers) > 1)
            html += [*waiting, f'<details class="guard"><summary style="padding-left:{indent}ch">'
                     f"checks, {lines}</summary><pre>{source.code(numbers)}</pre></details>"]
            waiting = []
        else:
            steps = dict.fromkeys(other for line, _, other in source.calls if line in numbers
                                  and FORMULAS.get(other, ("",))[0] and other not in shown)
            shown |= set(steps)
            html += [f'<div class="note step">{equation(other, True)}</div>' for other in steps]
            html += [*waiting, f"<pre>{source.code(numbers)}</pre>"]
            waiting = []
    head = f'<h3 id="{name}"><a href="#{name}">{name}</a></h3>' if name else ""
    beside = docstring(source, name, node) if name else ""
    html = "".join(["<section>", head, '<div class="body">', beside, *html, *waiting,
                    pencil(source, name, example), "</div></section>"])
    return html.replace('<section><div class="body"></div></section>', "")


def pencil(source, name, example):
    """The numbers of a function: the map's, the file's own worked example, or else a test."""
    full = f"{source.module}.{name}"
    text, lines, printed = PENCILS.get(full, ""), [], {}
    if example:
        text += f"\n\n`python {source.module}.py`, in float64 and to six digits:"
        for statement in sorted(example, key=lambda one: one.lineno):
            text += "\n\n" + source.comments.get(statement.lineno - 1, "")
            lines += [line.removeprefix("    ") for line in
                      source.lines[statement.lineno - 1 : statement.end_lineno]]
            printed[len(lines)] = example[statement]
    elif full in equations.PENCIL_TESTS:
        lines, path = examples.tests().get(equations.PENCIL_TESTS[full], ([], ""))
        text += f"\n\nA test of `tests/{path}`:" * bool(path)
    code = ""
    for i, line in enumerate(colour("\n".join(lines), [name] * len(lines), source.module), 1):
        output = escape(printed.get(i, "").rstrip())
        code += line + (f"<samp>{output}</samp>" if output else "\n")
    return f'<div class="pencil">{words(text)}<pre>{code.strip()}</pre></div>' if text else ""


# ---------------------------------------------------------------------------- pages


def glossary(html):
    """The symbols that a page has, each with its names in the code, its meaning and its unit."""
    items = []
    for key in [key for key in equations.SYMBOLS if f'data-sym="{key}"' in html]:
        _, meaning, unit, _ = equations.SYMBOLS[key]
        places = re.findall(rf'<span class="sym" data-sym="{key}"[^>]*>(\w+)<', html)
        code = ", ".join(f"<code>{name}</code>" for name in dict.fromkeys(places))
        items.append(f'<li id="meaning-{key}">{mathml(f"<{key}>", focus=False)} {code} '
                     f"{escape(meaning)}. <em>Unit: {escape(unit)}.</em></li>")
    return f'<h2 id="symbols">The symbols</h2><ul class="symbols">{"".join(items)}</ul>'


def page(name, title, body):
    """A whole HTML file, with style and script inside."""
    links = "".join(f'<a href="{other}.html"{" aria-current=page" if other == name else ""}>'
                    f"{other}</a>" for other in ["index", *PAGES])
    parts = {"title": title, "links": links, "body": body, "style": read("docs/page.css"),
             "script": read("docs/page.js")}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]].strip(),
                  read("docs/page.html"))


def file_page(source):
    """A page: what the file says first, its functions in order, its symbols."""
    printed = examples.of(source)
    title, _, intro = ast.get_docstring(source.tree).partition("\n\n")
    sections = "".join(section(source, *one, printed.get(one[0])) for one in source.sections)
    contents = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in source.functions)
    first, last = source.imports
    return page(source.module, f"{source.module}.py", (
        f"<header><h1>{source.module}.py</h1>{words(title)}</header>"
        f'<div class="intro">{words(intro)}</div>'
        f'<nav class="contents" aria-label="functions"><ul>{contents}</ul></nav>'
        "<details><summary>imports</summary>"
        f"<pre>{source.code(range(first, last + 1))}</pre></details>"
        f"{sections}{glossary(sections)}"))


def index_page(sources):
    """The front: the loop as a picture, the files in their order, the map with its equations."""
    files = []
    for source in sources:
        title, more, *_ = ast.get_docstring(source.tree).split("\n\n")
        files.append(f'<li><h2><a href="{source.module}.html">{source.module}.py</a></h2>'
                     f"{words(title)}{words(more)}</li>")
    rows = []
    for row in equations.MAP:
        links = [f'<a href="{LINKS[name]}">{name}</a>' for name in row["functions"]]
        formulas = "".join(lines_of(latex) for latex in row["functions"].values() if latex)
        said = escape(row["equation"].replace("\\|", "|"))
        cells = [row["paper"], formulas or said, "<br>".join(links), words(row["pencil"])]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    body = (f'<header><h1>The paper beside its code</h1>{words(read("docs/intro.md"))}</header>'
            f'<div class="front">{read("docs/loop.svg")}<ol class="files">{"".join(files)}</ol>'
            '</div><h2>The map</h2><table><tr><th>paper</th><th>equation</th>'
            f'<th>function</th><th>pencil example</th></tr>{"".join(rows)}</table>')
    return page("index", "The paper beside its code", body + glossary(body))


def build():
    """{file name: text} of all that is made."""
    sources = [Source(module) for module in PAGES]
    for source in sources:
        LINKS[f"{source.module}.py"] = f"{source.module}.html"
        for name in source.functions:
            LINKS[f"{source.module}.{name}"] = f"{source.module}.html#{name}"
            LINKS.setdefault(name, f"{source.module}.html#{name}")
    pages = {f"docs/{source.module}.html": file_page(source) for source in sources}
    return pages | {"docs/index.html": index_page(sources), "docs/map.md": equations.markdown()}


if __name__ == "__main__":
    for name, text in build().items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.encode()) / 1000:.0f} kB")
