"""SVG files as parts of one HTML page: nothing that runs, nothing that loads, no names that clash."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

_DROPPED = {"metadata", "script", "foreignObject", "style", "iframe", "audio", "video", "image", "animate", "set"}
_URL = re.compile(r"url\(\s*['\"]?(?P<target>[^)'\"]*)['\"]?\s*\)")


def inline_svg(path: Path, prefix: str, label: str) -> str:
    """An SVG file as an element for HTML.

    Args:
        path: the file.
        prefix: put before every id, so that several figures fit in one page.
        label: what the figure shows, for readers who do not see it.

    Raises:
        ValueError: the file is no SVG.
    """
    try:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise ValueError(f"{path} is no SVG file: {error}. Delete it and draw again.") from None
    if _name(root.tag) != "svg":
        raise ValueError(f"{path} is no SVG file: it holds <{_name(root.tag)}>. Delete it and draw again.")
    _clean(root, prefix)
    size = root.attrib.get("viewBox", "").split()
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-label": label,
        # What the dropped style sheet of the file said for all of its lines.
        "style": "stroke-linejoin: round; stroke-linecap: butt",
    }
    if len(size) == 4:
        # Points, as drawn; the page shrinks it to its own width.
        root.attrib |= {"width": size[2], "height": size[3]}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _clean(element: ElementTree.Element, prefix: str) -> None:
    """Keep shapes and text; ids and references get the prefix, and references leave the file nowhere."""
    element.tag = _name(element.tag)
    for name, value in list(element.attrib.items()):
        del element.attrib[name]
        name = _name(name)
        if name.startswith("on"):
            continue
        if name == "href":
            if value.startswith("#"):
                element.attrib["href"] = f"#{prefix}{value[1:]}"
            continue
        if name == "id":
            value = prefix + value
        element.attrib[name] = _URL.sub(lambda match: _reference(match["target"], prefix), value)
    for child in list(element):
        if not isinstance(child.tag, str) or _name(child.tag) in _DROPPED:
            element.remove(child)
        else:
            _clean(child, prefix)


def _reference(target: str, prefix: str) -> str:
    return f"url(#{prefix}{target[1:]})" if target.startswith("#") else "none"


def _name(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]
