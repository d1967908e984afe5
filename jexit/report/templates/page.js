"use strict";
// Shows a tooltip beside a token or a part of a chart: on hover, and for tokens also on focus with
// the arrow keys.
{
  const detail = document.createElement("div");
  detail.id = "detail";
  detail.setAttribute("role", "tooltip");
  detail.hidden = true;
  document.body.append(detail);
  let shown = null;

  const cellOf = (event) => event.target.closest?.('[role="gridcell"]') ?? null;
  const toldBy = (event) => event.target.closest?.('[role="gridcell"], svg [class]') ?? null;

  // Removes the title, so that the browser does not show its own tooltip as well.
  const detailOf = (element) => {
    const title = element.querySelector(":scope > title");
    if (title || element.title) {
      element.dataset.detail = title?.textContent ?? element.title;
      title?.remove();
      element.removeAttribute("title");
    }
    return element.dataset.detail;
  };

  const hide = () => {
    shown?.removeAttribute("aria-describedby");
    shown = null;
    detail.hidden = true;
  };

  const show = (element) => {
    hide();
    if (!detailOf(element)) return;
    shown = element;
    detail.textContent = element.dataset.detail;
    element.setAttribute("aria-describedby", detail.id);
    detail.hidden = false;
    const at = element.getBoundingClientRect();
    const { width, height } = detail.getBoundingClientRect();
    const room = document.documentElement;
    const below = at.bottom + 8 + height <= room.clientHeight;
    detail.style.top = `${below ? at.bottom + 8 : Math.max(4, at.top - 8 - height)}px`;
    const left = at.left + at.width / 2 - width / 2;
    detail.style.left = `${Math.max(4, Math.min(left, room.clientWidth - width - 4))}px`;
  };

  // The cell in the line above or below that is nearest to the middle of this one.
  const vertical = (cells, from, down) => {
    const at = from.getBoundingClientRect();
    const middle = at.left + at.width / 2;
    let best = null;
    let bestLine = null;
    let bestGap = Infinity;
    const index = cells.indexOf(from);
    const order = down ? cells.slice(index + 1) : cells.slice(0, index).reverse();
    for (const cell of order) {
      const box = cell.getBoundingClientRect();
      if (Math.abs(box.top - at.top) < 2) continue;
      bestLine ??= box.top;
      if (Math.abs(box.top - bestLine) >= 2) break;
      const gap = Math.abs(box.left + box.width / 2 - middle);
      if (gap < bestGap) [best, bestGap] = [cell, gap];
    }
    return best;
  };

  const target = (key, cells, cell) => {
    const index = cells.indexOf(cell);
    switch (key) {
      case "ArrowRight": return cells[index + 1];
      case "ArrowLeft": return cells[index - 1];
      case "ArrowDown": return vertical(cells, cell, true);
      case "ArrowUp": return vertical(cells, cell, false);
      case "Home": return cells[0];
      case "End": return cells.at(-1);
      default: return undefined;
    }
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const cell = cellOf(event);
    if (!cell || event.ctrlKey || event.altKey || event.metaKey) return undefined;
    const cells = [...cell.parentElement.querySelectorAll('[role="gridcell"]')];
    const next = target(event.key, cells, cell);
    if (next === undefined) return undefined;
    event.preventDefault();
    if (next === null) return undefined;
    // Each map has one stop of the Tab key: the cell that had the focus last.
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    return undefined;
  });
  document.addEventListener("focusin", (event) => {
    const cell = cellOf(event);
    if (!cell) return hide();
    for (const other of cell.parentElement.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    cell.tabIndex = 0;
    return show(cell);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("mouseover", (event) => {
    const element = toldBy(event);
    if (element) show(element);
  });
  document.addEventListener("mouseout", (event) => {
    if (!toldBy(event)) return;
    const focused = cellOf({ target: document.activeElement });
    if (focused) show(focused);
    else hide();
  });
  addEventListener("scroll", () => shown && show(shown), { passive: true });
}
