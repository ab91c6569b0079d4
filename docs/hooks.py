"""What the site shows beside the pages as they stand: files of the repository, and what is made from the code.

A page may hold these comments, which GitHub does not show; each is replaced:
<!-- include: FILE, HEADING -->    what stands under this heading in a Markdown file of the repository
<!-- generated: command line -->   the help of every verb
<!-- generated: recipe keys -->    every key of a recipe: type, default, meaning
Links that leave docs/ lead to a copy of the file in the site; those to other Markdown files become plain text.
"""

from __future__ import annotations

import argparse
import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

from psn_train.cli import _parser
from psn_train.recipe import Recipe, recipe_schema

ROOT = Path(__file__).parents[1]
# pages that show a Markdown file of the repository
SHOWN = {"recipes/README.md": "results.md"}
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"^<!-- (include|generated): (.+?) -->$", re.MULTILINE)
# a warning ends a strict build
log = logging.getLogger("mkdocs.hooks.psn_train")
_copied: set[str] = set()


def on_files(files, config):
    """Put the files that pages link to into the site."""
    _copied.clear()
    for page in list(files.documentation_pages()):
        rewrite(page.content_string, page.src_uri)
    for name in sorted(_copied):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The page as the site shows it."""
    if page.file.src_uri in SHOWN.values():
        # their tables are wide
        page.meta["hide"] = ["toc"]
    return rewrite(markdown, page.file.src_uri)


def rewrite(text: str, page: str) -> str:
    """Comments replaced, and links that leave docs/ led to where the site has what they name.

    Args:
        page: its path in docs/.
    """
    return outside_code(
        _COMMENT.sub(lambda found: made(found[1], found[2], page), text), lambda part: links(part, page)
    )


def outside_code(text: str, change) -> str:
    return "".join(part if part.startswith("```") else change(part) for part in _FENCE.split(text))


def made(kind: str, what: str, page: str) -> str:
    if kind == "generated":
        return {"command line": command_line, "recipe keys": recipe_keys}[what]()
    name, _, heading = what.partition(", ")
    inside = section((ROOT / name).read_text(encoding="utf-8"), heading)
    if inside is None:
        log.warning("%s: %s has no heading %r", page, name, heading)
        return ""
    # relative to docs/ what was relative to the file
    up = "../" * (1 + page.count("/"))

    def moved(link: re.Match) -> str:
        if re.match(r"[a-z]+:|#", link[2]):
            return link[0]
        return f"[{link[1]}]({up}{posixpath.normpath(posixpath.join(posixpath.dirname(name), link[2]))})"

    return outside_code(inside, lambda part: _LINK.sub(moved, part))


def section(text: str, heading: str) -> str | None:
    """What stands under a heading, up to the next one of any level."""
    inside = None
    for part in _FENCE.split(text):
        if part.startswith("```"):
            inside = None if inside is None else inside + part
            continue
        for line in part.splitlines(keepends=True):
            if re.match("#+ ", line):
                if inside is not None:
                    return inside
                inside = "" if line.lstrip("#").strip() == heading else None
            elif inside is not None:
                inside += line
    return inside


def links(text: str, page: str) -> str:
    def lead(link: re.Match) -> str:
        label, target = link[1], link[2]
        path, _, anchor = target.partition("#")
        inner = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
        if re.match(r"[a-z]+:", target) or not path or inner.startswith("docs/"):
            return link[0]
        back = "../" * page.count("/")
        if inner in SHOWN:
            return f"[{label}]({back}{SHOWN[inner]}{'#' + anchor if anchor else ''})"
        if not (ROOT / inner).is_file():
            log.warning("%s: %s leads to no file of the repository; folders are named, not linked to", page, target)
            return label
        if inner.endswith(".md"):
            return label
        _copied.add(inner)
        return f"[{label}]({back}files/{inner})"

    return _LINK.sub(lead, text)


# ---- from the code


def command_line() -> str:
    """Every verb with its help, in the order of `psn --help`."""
    # argparse wraps at the terminal's width
    os.environ["COLUMNS"] = "100"
    parts = []
    for name, parser in verbs(_parser(), "psn"):
        parts.append(f"## {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(parts)


def verbs(parser: argparse.ArgumentParser, name: str) -> list[tuple[str, argparse.ArgumentParser]]:
    """(name, parser) of every verb that does something; `psn shards` and the like are the verbs within."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        return [(name, parser)]
    return [found for verb, child in inner[0].choices.items() for found in verbs(child, f"{name} {verb}")]


def recipe_keys() -> str:
    """A table for each section of a recipe; what belongs to none first."""
    schema, strict = recipe_schema(), Recipe.model_json_schema()["$defs"]
    parts = {name: one for name, one in schema["properties"].items() if section_of(one) is None}
    texts = ["## Beside the sections\n\n" + key_table("", parts, [])]
    for name, one in schema["properties"].items():
        if (inner := section_of(one)) is not None:
            # a file may leave to its parent what a recipe has to have
            required = strict[inner].get("required", [])
            texts.append(f"## {name}\n\n" + key_table(f"{name}.", schema["$defs"][inner]["properties"], required))
    return "\n\n".join(texts)


def section_of(one: dict) -> str | None:
    """The definition that a key refers to, if it is a section."""
    for found in (one, *one.get("anyOf", ()), *one.get("allOf", ())):
        if "$ref" in found:
            return found["$ref"].rpartition("/")[2]
    return None


def key_table(prefix: str, properties: dict, required: list[str]) -> str:
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for name, one in properties.items():
        default = "has to be given" if name in required else f"`{value_text(one.get('default'))}`"
        meaning = " ".join(one.get("description", "").split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {type_text(one)} | {default} | {meaning} |")
    return "\n".join(rows)


def value_text(value) -> str:
    """As YAML has it, in one line."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_text(one)}" for key, one in value.items()) + "}"
    return words[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def type_text(one: dict) -> str:
    if "enum" in one:
        return ", ".join(f"`{value_text(value)}`" for value in one["enum"])
    if "const" in one:
        return f"`{value_text(one['const'])}`"
    if "anyOf" in one:
        return " or ".join(type_text(part) for part in one["anyOf"] if part.get("type") != "null")
    kind = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    if one.get("type") == "array":
        return f"list of {type_text(one['items'])}" if one.get("items") else "list"
    if one.get("type") == "object":
        return "names and values"
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {one[key]:,}" for key, word in bounds.items() if key in one]
    return " ".join([kind.get(one.get("type"), "any value"), *limits])
