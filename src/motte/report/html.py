"""HTML from parts that are escaped unless they are HTML already. No text of a file can become markup here."""

from __future__ import annotations

import html
import json
from typing import Any, Final

from motte.report import words

_VOID: Final = frozenset(("meta", "img", "link", "br", "hr"))


class Markup(str):
    """Text that is HTML already. Only this file makes it from other text."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """``text`` as it is to be read: special characters escaped, invisible ones written out."""
    return Markup(html.escape(words.visible(text), quote=True))


def tag(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """One element. A child that is no :class:`Markup` is escaped; so is every attribute.

    ``class_`` and ``for_`` lose their underscore, others turn into dashes. True stands for a bare attribute; False and
    None leave it out.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Children one after the other, each escaped unless it is :class:`Markup`."""
    return Markup("".join(each if isinstance(each, Markup) else escaped(each) for each in children))


def trusted_source(text: str) -> Markup:
    """Our own style sheet, script or drawing, as it stands. Never for text that came out of a file of results."""
    return Markup(text)


def data_block(value: Any, identifier: str) -> Markup:
    """``value`` as JSON that the page's script reads. No text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" id="{identifier}">{safe}</script>')


def _attribute(key: str, value: str | float | bool | None) -> str:
    name = key.removesuffix("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escaped(value if isinstance(value, str) else f"{value:g}")}"'
