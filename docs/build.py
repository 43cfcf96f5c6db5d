"""The paper's equations, our words and the code, side by side: `python docs/build.py`.

Writes index.html and a page for each of sft, reward, ppo, judge and lm beside this file, and the
map into README.md. All of it comes from the sources: functions, docstrings and comments by `ast`
and `tokenize`, equations and symbols from equations.py, the numbers of the pencil examples from
examples.py. Each page is one file and asks for nothing over a network.
"""

import ast
import io
import re
import sys
import tokenize
from html import escape
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

PAGES = ["lm", "sft", "reward", "ppo", "judge"]  # README's order of reading
SECTION = re.compile(r"\b(?:[34]\.[1-4]|[A-H]\.\d|(?<=App\. )[A-H])\b(?![.\d])")  # of the paper
FORMULAS = {name: (row["paper"], latex) for row in equations.MAP
            for name, latex in row["functions"].items() if latex} | equations.OTHERS
PENCILS = {row.get("of", next(iter(row["functions"]))): row["pencil"] for row in equations.MAP}
KEYS = {name: key for key, symbol in equations.SYMBOLS.items() for name in symbol[3].split()}


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- words and code


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
    module, function = name.split(".", 1)
    source = f'<a href="{module}.html#{function}">{function}</a>' if link else ""
    return f'<figure>{lines_of(latex)}<figcaption>{place(paper)} {source}</figcaption></figure>'


def place(paper):
    """A section of the paper, or what else a formula goes back to."""
    sign = "§ " if re.match(r"\d|[A-H]\b", paper) else ""
    return f'<span class="paper">{sign}{paper or "not in the paper"}</span> '


def words(text):
    """A docstring or comments -> HTML; a function in backticks becomes a link to its section."""
    html = MarkdownIt("commonmark", {"html": False}).render(text)
    return re.sub(r"<code>(?:\w+\.)?(\w+)</code>",
                  lambda m: f'<a href="{LINKS[m[1]]}">{m[0]}</a>' if m[1] in LINKS else m[0], html)


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
            names = [f"{scope.split('.')[-1]}.{part}", f"{owner}.{part}", f"{module}.{part}", part]
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


# ---------------------------------------------------------------------------- one file


class Source:
    """A file, read once: its tree, its lines as text and as HTML, its comments, its sections."""

    def __init__(self, module):
        self.module, self.text = module, read(f"{module}.py")
        self.tree, self.lines = ast.parse(self.text), self.text.split("\n")
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        self.comments = {token.start[0]: token.string[1:].removeprefix(" ") for token in tokens
                         if token.type == tokenize.COMMENT
                         and not self.lines[token.start[0] - 1][: token.start[1]].strip()}
        *body, self.main = self.tree.body
        assert isinstance(self.main, ast.If), f"{module}.py ends in its worked example"
        self.imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.home = {alias.name: node.module for node in self.imports
                     if isinstance(node, ast.ImportFrom) for alias in node.names}
        self.sections = {}  # name -> (node, its last line), in the order of the file
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                inner = [sub for sub in node.body if isinstance(sub, ast.FunctionDef)]
                self.sections[node.name] = node, start(inner[0]) - 1 if inner else node.end_lineno
                for sub in inner:
                    self.sections[f"{node.name}.{sub.name}"] = sub, sub.end_lineno
        self.home |= {name: module for name in self.sections}
        scopes = [""] * len(self.lines)
        for name, (node, end) in self.sections.items():
            scopes[start(node) - 1 : end] = [name] * (end - start(node) + 1)
        self.html = colour(self.text, scopes, module)

    def called(self, node, first, last):
        """Full names of our functions that stand in some lines of a node, in their order."""
        names = [(sub.lineno, sub.col_offset, sub.id) for sub in ast.walk(node)
                 if isinstance(sub, ast.Name) and first <= sub.lineno <= last]
        return list(dict.fromkeys(f"{self.home[name]}.{name}" for _, _, name in sorted(names)
                                  if name in self.home))

    def code(self, numbers):
        return "\n".join(self.html[i - 1] for i in numbers).strip("\n")


def start(node):
    """The first line of a function or class, its decorators included."""
    return min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])


def rows_of(source, node, first, last):
    """Lines of a file -> [(words, line numbers of code)]: a new row at each block of comments. The
    docstring stands beside the line with `def`; headings are rows (heading, None)."""
    doc = node.body[0] if ast.get_docstring(node) else None
    rows, text, numbers = [], [], []
    for i in range(first, last + 2):
        comment = source.comments.get(i)
        new = i == start(node) or comment is not None or i > last
        if new and any(source.lines[j - 1].strip() for j in numbers):
            rows.append(("\n".join(text), numbers))
            text, numbers = [], []
        if i > last:
            break
        if comment is not None and comment.startswith("-----"):
            rows.append((comment.strip("- "), None))
        elif comment is not None:
            text.append(comment)
        elif i == start(node):
            text += ["", ast.get_docstring(node) or ""]
        if comment is None and not (doc and doc.lineno <= i <= doc.end_lineno):
            numbers.append(i)
    return rows


def grid_row(left, middle, code, css="row"):
    code = f"<pre>{code}</pre>" if code else ""
    return (f'<div class="{css}"><div class="paper-cell">{left}</div>'
            f'<div class="words">{middle}</div><div class="code">{code}</div></div>')


def section(source, name, first, example):
    """A function: its rows, each with the equations of the steps that it calls, and its pencil."""
    node, last = source.sections[name]
    full, html = f"{source.module}.{name}", []
    shown = {full}
    for text, numbers in rows_of(source, node, first, last):
        if numbers is None:
            html.insert(0, f"<h2>{escape(text)}</h2>")
            continue
        left = ""
        if start(node) in numbers:
            html.append(f'<h3 id="{name}"><a href="#{name}">{name}</a></h3>')
            left = equation(full) if full in FORMULAS else ""
        for other in source.called(node, numbers[0], numbers[-1]):
            if FORMULAS.get(other, ("",))[0] and other not in shown:  # a step of the paper
                left += equation(other, link=True)
                shown.add(other)
        refs = [ref for ref in dict.fromkeys(SECTION.findall(text)) if ref not in left]
        left += "".join(place(ref) for ref in refs)
        text = re.sub(r"(?m)^( {4}\S.*?) {4,}(?=\S)", r"\1\n    ", text)  # two formulas in a line
        html.append(grid_row(left, words(text), source.code(numbers)))
    html += [pencil(source, name, example), "</section>"]
    return "\n".join(["<section>", *html])


def pencil(source, name, example):
    """The row with the numbers: README's, the file's own worked example, or else a test."""
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
        path, test = equations.PENCIL_TESTS[full].split("::")
        lines = examples.lines_of_test(read(f"tests/{path}"), test)
        text += f"\n\nA test of `tests/{path}`:"
    code = ""
    for i, line in enumerate(colour("\n".join(lines), [name] * len(lines), source.module), 1):
        output = escape(printed.get(i, "").rstrip())
        code += line + (f"<samp>{output}</samp>" if output else "\n")
    return grid_row("", words(text), code.strip(), "row pencil") if text else ""


# ---------------------------------------------------------------------------- pages


def glossary(html):
    """The symbols that a page has, each with its names in the code, its meaning and its unit."""
    keys = [key for key in equations.SYMBOLS if f'data-sym="{key}"' in html]
    items = []
    for key in keys:
        _, meaning, unit, _ = equations.SYMBOLS[key]
        places = re.findall(rf'<span class="sym" data-sym="{key}"[^>]*>(\w+)<', html)
        code = ", ".join(f"<code>{name}</code>" for name in dict.fromkeys(places))
        items.append(f'<li id="meaning-{key}">{mathml(f"<{key}>", focus=False)} {code} '
                     f"{escape(meaning)}. <em>Unit: {escape(unit)}.</em></li>")
    return f'<h2 id="symbols">The symbols</h2><ul class="symbols">{"".join(items)}</ul>'


def page(name, title, body):
    """A whole HTML file, with style and script inside."""
    links = "".join(f'<a href="{other}.html"{" aria-current=page" if other == name else ""}>'
                    f"{other if other == 'index' else other + '.py'}</a>"
                    for other in ["index", *PAGES])
    parts = {"title": title, "links": links, "body": body, "style": read("docs/page.css"),
             "script": read("docs/page.js")}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]].strip(),
                  read("docs/page.html"))


def file_page(source):
    """A page: what the file says first, its functions in order, its symbols."""
    printed, sections = examples.of(source), []
    first = source.imports[-1].end_lineno + 1
    for name, (_, last) in source.sections.items():
        sections.append(section(source, name, first, printed.get(name)))
        first = last + 1
    title, _, intro = ast.get_docstring(source.tree).partition("\n\n")
    contents = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in source.sections)
    imports = source.code(range(source.imports[0].lineno, source.imports[-1].end_lineno + 1))
    body = (f"<header><h1>{source.module}.py</h1>{words(title)}</header>"
            f'<div class="intro">{words(intro)}</div>'
            f'<nav class="contents" aria-label="functions"><ul>{contents}</ul></nav>'
            f"<details><summary>imports</summary><pre>{imports}</pre></details>"
            '<div class="row heads"><div>the paper</div><div>our words</div><div>the code</div>'
            f'</div>{"".join(sections)}')
    return page(source.module, f"{source.module}.py", body + glossary("".join(sections)))


def index_page(sources):
    """The front: the files in their order, and the map with its equations."""
    files = []
    for source in sources:
        paragraphs = ast.get_docstring(source.tree).split("\n\n")
        files.append(f'<li><h2><a href="{source.module}.html">{source.module}.py</a></h2>'
                     f"{words(paragraphs[0])}{words(paragraphs[1])}</li>")
    rows = []
    for row in equations.MAP:
        links = [f'<a href="{LINKS[name.split(".")[1]]}">{name}</a>' if name.split(".")[1] in LINKS
                 else name for name in row["functions"]]
        formulas = "".join(lines_of(latex) for latex in row["functions"].values() if latex)
        said = escape(row["equation"].replace("\\|", "|"))
        cells = [row["paper"], formulas or said, "<br>".join(links), words(row["pencil"])]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    body = ("<header><h1>The paper beside its code</h1>"
            f'{words(read("docs/intro.md"))}</header><ol class="files">{"".join(files)}</ol>'
            '<h2>The map</h2><div class="wide"><table><tr><th>paper</th><th>equation</th>'
            f'<th>function</th><th>pencil example</th></tr>{"".join(rows)}</table></div>')
    return page("index", "The paper beside its code", body + glossary(body))


LINKS = {}  # function -> its place; words() and index_page() read it


def build():
    """{file name: text} of all that is made: the pages, and README with its map."""
    sources = [Source(module) for module in PAGES]
    LINKS.update({name: f"{source.module}.html#{name}" for source in sources
                  for name in source.sections})
    pages = {f"docs/{source.module}.html": file_page(source) for source in sources}
    pages["docs/index.html"] = index_page(sources)
    readme = read("README.md")
    before, heading, after = readme.partition("\n## The map\n")
    rest = after[after.index("\n\n") :]
    return pages | {"README.md": before + heading + equations.readme_map() + rest}


if __name__ == "__main__":
    for name, text in build().items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.encode()) / 1000:.0f} kB")
