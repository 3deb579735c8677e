"use strict";
// Draws every chart of the page. Colours are names of the style sheet, so light, dark and print need no redrawing.
const ksm = JSON.parse(document.getElementById("ksm-island").textContent);
ksm.views = {};
ksm.drawn = Promise.all(
  [...document.querySelectorAll("[data-chart]")].map(async (place) => {
    const name = place.dataset.chart;
    if (!(name in ksm.specs)) return;
    const made = await window.vegaEmbed(place, ksm.specs[name], {
      actions: false,
      ast: true, // expressions are interpreted: the page forbids eval
      config: ksm.config,
      renderer: "svg",
      tooltip: { theme: "ksm" },
    });
    ksm.views[name] = made.view;
    for (const form of place.querySelectorAll("form")) form.remove(); // for bindings, of which there are none
    // The element around it has the role and the label already.
    for (const drawing of place.querySelectorAll("svg")) drawing.setAttribute("aria-hidden", "true");
  }),
).then(() => document.documentElement.setAttribute("data-drawn", ""));

// What is folded away on the screen is printed.
const folded = [];
window.addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details:not([open])")) {
    one.open = true;
    folded.push(one);
  }
});
window.addEventListener("afterprint", () => {
  for (const one of folded.splice(0)) one.open = false;
});
