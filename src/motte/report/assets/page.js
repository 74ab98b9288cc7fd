"use strict";
(() => {
  const store = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];

  // --- tables: a button in each heading, figures that are not there last, either way --------------------------------
  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell.hasAttribute("data-value")) return null;
    const value = cell.getAttribute("data-value");
    return cell.classList.contains("number") ? Number(value) : value;
  };
  const order = (one, other) => {
    if (typeof one === "number" && typeof other === "number") return one - other;
    return String(one).localeCompare(String(other), "en", { numeric: true });
  };
  const sort = (table, heading) => {
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const each of table.tHead.rows[0].cells) each.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [key(row, heading.cellIndex), row]);
    rows.sort(([one], [other]) => {
      if (one === null || other === null) return (one === null) - (other === null);
      return ascending ? order(one, other) : order(other, one);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const heading of table.tHead.rows[0].cells) {
      heading.querySelector("button").addEventListener("click", () => sort(table, heading));
    }
  }

  // --- figures: drawn when they come into sight, by the library that stands compressed at the end of the page -------
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const filled = (value) => {
    if (Array.isArray(value)) return value.map(filled);
    if (value === null || typeof value !== "object") return value;
    const names = Object.keys(value);
    if (names.length === 1) {
      if (names[0] === "array" && Number.isInteger(value.array)) return store.arrays[value.array];
      if (names[0] === "series") return colour(`series-${value.series}`);
      if (names[0] === "theme") return colour(value.theme);
    }
    return Object.fromEntries(names.map((name) => [name, filled(value[name])]));
  };
  // On a narrow screen long words take the whole width: broken into lines, with room for the legend above.
  const broken = (text, room) => {
    const lines = [""];
    for (const word of text.split(" ")) {
      const last = lines[lines.length - 1];
      if (last && last.length + 1 + word.length > room) lines.push(word);
      else lines[lines.length - 1] = last ? `${last} ${word}` : word;
    }
    return lines.join("<br>");
  };
  const narrowed = (given, names) => {
    const axes = {};
    for (const name of ["xaxis", "yaxis"]) {
      const axis = { ...given[name] };
      if (axis.title) axis.title = { text: broken(axis.title.text, 30) };
      if (name === "yaxis" && axis.categoryarray) {
        Object.assign(axis, { tickmode: "array", tickvals: axis.categoryarray, ticktext: axis.categoryarray.map((text) => broken(text, 17)) });
        Object.assign(axis, { tickfont: { size: 10.5 } });
      }
      axes[name] = axis;
    }
    const rows = given.yaxis.categoryarray ? given.yaxis.categoryarray.length * 14 : 0;
    return { ...given, ...axes, height: given.height + rows + (given.showlegend ? Math.max(0, names - 2) * 19 : 0) };
  };
  const layout = (wide, place, names) => {
    const given = place.clientWidth < 560 ? narrowed(wide, names) : wide;
    const axis = (own) => ({
      gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("grid"), tickcolor: colour("line"), ...filled(own),
    });
    return {
      ...given,
      xaxis: axis(given.xaxis),
      yaxis: axis(given.yaxis),
      autosize: true,
      margin: { l: 56, r: 12, t: 12, b: 48 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("text"), size: 12.5, family: getComputedStyle(document.body).fontFamily },
      legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", traceorder: "normal", itemsizing: "constant" },
      hovermode: "closest",
      hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: colour("text") }, align: "left", namelength: -1 },
      bargap: 0.25,
    };
  };
  let library = null;
  const unpack = async () => {
    const packed = document.getElementById("plotly").textContent;
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    if (!window.Plotly) throw new Error("the figures' library did not start");
  };
  const draw = async (place) => {
    place.dataset.state = "drawing";
    try {
      library ??= unpack();
      await library;
      const figure = store.figures[place.dataset.figure];
      place.textContent = "";
      place.classList.remove("waiting");
      await window.Plotly.react(place, filled(figure.data), layout(figure.layout, place, figure.data.length), { displayModeBar: false, responsive: true });
      place.dataset.state = "drawn";
    } catch (problem) {
      place.dataset.state = "failed";
      place.classList.add("waiting");
      place.textContent = "This browser cannot draw the interactive figure; the PNG beside this page shows the same.";
    }
  };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const place of plots) seen.observe(place);
  const redraw = () => plots.filter((place) => place.dataset.state === "drawn").forEach(draw);
  dark.addEventListener("change", redraw);
})();
