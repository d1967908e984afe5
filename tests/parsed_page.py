"""A page as a tree, read strictly: elements must close in order, and ids must be unique."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

VOID = {"br", "hr", "meta", "link", "img", "input"}


class Element:
    def __init__(self, name: str, attributes: dict[str, str | None]) -> None:
        self.name, self.attributes = name, attributes
        self.children: list[Element | str] = []

    def __iter__(self) -> Iterator[Element]:
        """This element and all below it, in the order of the page."""
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child

    def all(self, name: str, **attributes: str) -> list[Element]:
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            element
            for element in self
            if element.name == name and wanted.items() <= element.attributes.items()
        ]

    def one(self, name: str, **attributes: str) -> Element:
        found = self.all(name, **attributes)
        assert len(found) == 1, f"{len(found)} × {name} {attributes}"
        return found[0]

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("page", {})
        self.open = [self.root]

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        keys = [key for key, _ in attributes]
        assert len(keys) == len(set(keys)), f"{name} has an attribute twice: {keys}"
        element = Element(name, dict(attributes))
        self.open[-1].children.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{name}/> is no HTML")

    def handle_endtag(self, name: str) -> None:
        assert self.open[-1].name == name, f"</{name}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"<![{data}]> is no HTML")

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"<!--{data}--> was not asked for")


def parse(page: str) -> Element:
    """The page's tree; raises AssertionError where it is not well-formed."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"{parser.open[-1].name} is never closed"
    ids = [e.attributes["id"] for e in parser.root if "id" in e.attributes]
    assert len(ids) == len(set(ids)), ids
    return parser.root


def cells(table: Element) -> list[list[str]]:
    """The texts of a table's cells, row by row, its head first."""
    return [[cell.text for cell in row if cell.name in ("th", "td")] for row in table.all("tr")]
