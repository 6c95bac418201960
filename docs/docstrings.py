"""Docstrings of the package, which are Markdown, as Sphinx reads them."""

import re

_CODE = re.compile(r"(`+)(.+?)\1")
_LINK = re.compile(r"\[([^]]+)\]\((https?://[^)\s]+)\)")
_NAMES = re.compile(r"(?m)^ {4}\w[\w, ]*,(\n {8}\w[\w, ]*,)*\n {8}\w[\w, ]*:")
_NAME = re.compile(r"performer(\.\w+)+")


def translate(app, what, name, obj, options, lines):
    """Translates the lines of a docstring, in place; a handler of `autodoc-process-docstring`."""
    lines[:] = to_restructured_text(lines)


def to_restructured_text(lines):
    """Lines of Markdown with sections in Google's style, in reStructuredText with the same.

    Code in backticks stays code, and a public name in it becomes a link. Signs that mean something
    in reStructuredText only are escaped. What stands indented under a paragraph is a formula.

    Example:

    >>> to_restructured_text(["`a * b` of |x|, see `performer.read`."])
    ['``a * b`` of \\\\|x\\\\|, see :py:obj:`performer.read`.']
    >>> to_restructured_text(["The sum is", "", "    a + b", "", "exactly."])
    ['The sum is', '', '::', '', '    a + b', '', 'exactly.']
    """
    text = "\n".join(lines)
    # Names of arguments that go on in the next line are one line, and so is code.
    text = _NAMES.sub(_in_one_line, text)
    text = re.sub(r"`[^`]+`", _in_one_line, text)
    result, example, formula = [], False, False
    before = [""]
    for line in text.split("\n"):
        example = line.strip() != "" and (example or line.lstrip().startswith(">>>"))
        indented = line.startswith("    ") and not example
        follows_text = before[-1] == "" and len(before) > 1 and _is_text(before[-2])
        if indented and (formula or follows_text):
            if not formula:
                result += ["::", ""]
            formula = True
        elif line.strip():
            formula = False
        result.append(line if example or formula else _line(line))
        before.append(line)
    return result


def _in_one_line(match):
    """What was matched, without breaks; the indent before it stays."""
    return re.sub(r"\s*\n\s*", " ", match[0])


def _is_text(line):
    """Whether a line is the last one of a paragraph, and no section's."""
    return line != "" and not line.startswith((" ", ">>>", "- "))


def _line(line):
    """A line without code blocks."""
    parts, end = [], 0
    for code in _CODE.finditer(line):
        # A letter beside code would hide it.
        joined = [r"\ " if re.search(r"\w$", line[end : code.start()]) else ""]
        joined += [r"\ " if re.match(r"\w", line[code.end() :]) else ""]
        parts += [_escaped(line[end : code.start()]), _code(code[2]).join(joined)]
        end = code.end()
    return "".join([*parts, _escaped(line[end:])])


def _code(text):
    return f":py:obj:`{text}`" if _NAME.fullmatch(text) else f"``{text}``"


def _escaped(text):
    parts, end = [], 0
    for link in _LINK.finditer(text):
        parts += [_signs(text[end : link.start()]), f"`{link[1]} <{link[2]}>`__"]
        end = link.end()
    return "".join([*parts, _signs(text[end:])])


def _signs(text):
    """Stars, bars and underscores at the end of words, as they are."""
    text = re.sub(r"[*|]", r"\\\g<0>", text)
    return re.sub(r"(\w_)(?!\w)", lambda word: word[1][:-1] + r"\_", text)
