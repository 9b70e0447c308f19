"use strict";
// Interaction with the map: coloring, tooltips and keyboard navigation. All other parts of the
// page work without a script.
(() => {
  const box = document.getElementById("map-box");
  if (!box) return;
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const tip = document.getElementById("map-tip");
  const crop = tip.querySelector(".crop");
  const text = document.getElementById("map-text");
  const now = document.getElementById("map-now");
  const views = [...box.querySelectorAll(".view")];
  let current = -1;

  const shown = () => views.find((view) => !view.hidden).querySelector("svg");

  function place(event) {
    const matrix = shown().getScreenCTM().inverse();
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
  }

  function nearest(x, y, accept) {
    let best = -1, least = Infinity;
    data.points.forEach((point, i) => {
      const dx = point[0] - x, dy = point[1] - y;
      const distance = accept ? accept(dx, dy) : dx * dx + dy * dy;
      if (distance < least) { least = distance; best = i; }
    });
    return [best, least];
  }

  function describe(point) {
    const labels = [point[2]];
    if (data.clustered) labels.push(point[3] < 0 ? "no cluster" : "cluster " + point[3]);
    if (point[4]) labels.push("camera " + point[4]);
    return labels;
  }

  function show(i, speak) {
    current = i;
    if (i < 0) {
      tip.hidden = true;
      box.querySelectorAll(".ring").forEach((ring) => ring.setAttribute("cx", -20));
      return;
    }
    const point = data.points[i];
    box.querySelectorAll(".ring").forEach((ring) => {
      ring.setAttribute("cx", point[0]);
      ring.setAttribute("cy", point[1]);
    });
    const labels = describe(point);
    text.replaceChildren(...labels.map((label) => {
      const line = document.createElement("div");
      line.textContent = label;
      return line;
    }));
    if (data.sprite) {
      const scale = 1.5, [w, h] = data.sprite.cell.map((v) => v * scale);
      const column = i % data.sprite.columns, row = Math.floor(i / data.sprite.columns);
      crop.style.width = w + "px";
      crop.style.height = h + "px";
      crop.style.backgroundSize = w * data.sprite.columns + "px " + h * data.sprite.rows + "px";
      crop.style.backgroundPosition = -column * w + "px " + -row * h + "px";
    }
    tip.hidden = false;
    const svg = shown().getBoundingClientRect(), outer = box.getBoundingClientRect();
    const matrix = shown().getScreenCTM();
    const at = new DOMPoint(point[0], point[1]).matrixTransform(matrix);
    let left = at.x - outer.left + 14, top = at.y - outer.top + 14;
    if (left + tip.offsetWidth > outer.width) left = at.x - outer.left - tip.offsetWidth - 14;
    if (at.y + 14 + tip.offsetHeight > svg.bottom) top -= tip.offsetHeight + 28;
    tip.style.left = Math.max(0, left) + "px";
    tip.style.top = Math.max(0, top) + "px";
    if (speak) now.textContent = labels.join(", ");
  }

  box.addEventListener("pointermove", (event) => {
    if (!event.target.closest("svg") || event.target.closest("ul")) return show(-1);
    const at = place(event), [i, distance] = nearest(at.x, at.y);
    show(distance < 400 ? i : -1);
  });
  box.addEventListener("pointerdown", (event) => {
    if (event.target.closest("ul")) return;
    const at = place(event), [i, distance] = nearest(at.x, at.y);
    show(distance < 900 ? i : -1, true);
  });
  box.addEventListener("pointerleave", () => show(-1));
  box.addEventListener("blur", () => show(-1));
  window.addEventListener("resize", () => show(-1));

  const directions = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  box.addEventListener("keydown", (event) => {
    if (event.target !== box) return;
    if (event.key === "Escape") return show(-1);
    const direction = directions[event.key];
    if (!direction) return;
    event.preventDefault();
    if (current < 0) return show(nearest(400, 280)[0], true);
    const [x, y] = data.points[current];
    // Select the nearest point within 45 degrees of the direction.
    const [i] = nearest(x, y, (dx, dy) => {
      const along = dx * direction[0] + dy * direction[1];
      const across = Math.abs(dx * direction[1]) + Math.abs(dy * direction[0]);
      return along > 0 && across <= along ? along + 2 * across : Infinity;
    });
    if (i >= 0) show(i, true);
  });

  document.querySelectorAll("input[name=view]").forEach((input) => {
    input.addEventListener("change", () => {
      views.forEach((view) => { view.hidden = view.id !== "view-" + input.value; });
      show(-1);
    });
  });

  box.querySelectorAll("button[data-group]").forEach((button) => {
    button.addEventListener("click", () => {
      const view = button.closest(".view"), on = button.getAttribute("aria-pressed") !== "true";
      view.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", "false"));
      button.setAttribute("aria-pressed", String(on));
      view.classList.toggle("focused", on);
      view.querySelectorAll(".mark").forEach((mark) => {
        mark.classList.toggle("chosen", on && mark.dataset.group === button.dataset.group);
      });
    });
  });
})();
