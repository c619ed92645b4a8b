"use strict";
// Draws the charts from the JSON in the page, again when an axis, the smoothing, the runs or the width change.
(() => {
  const {runs, charts} = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const x = byId("x"), log = byId("log"), smooth = byId("smooth");
  const boxes = [...document.querySelectorAll("[data-run]")];
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"], COLOURS = 10;
  const LEFT = 52, RIGHT = 12, TOP = 8, BOTTOM = 34;
  const CIRCLES = 60;  // a line with more validations has none
  const UNITS = {steps: "step", tokens: "tokens", hours: "hours"};

  const text = (v) => {
    const a = Math.abs(v);
    if (a !== 0 && a < 1e-3) return v.toExponential(2).replace(/\.?0+e/, "e");
    if (a >= 1e5) return new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4}).format(v);
    return a >= 1e3 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(5));
  };

  // The x of a step on the chosen axis: between the ends of the run's points, or beyond the last at the same rate.
  const along = (run) => {
    if (x.value === "steps") return (step) => step;
    const steps = [0, ...run.axis.step], values = [0, ...run.axis[x.value]];
    return (step) => {
      let i = 1, to = steps.length - 1;
      while (i < to) { const m = (i + to) >> 1; if (steps[m] < step) i = m + 1; else to = m; }
      const width = steps[i] - steps[i - 1];
      return width ? values[i - 1] + (step - steps[i - 1]) / width * (values[i] - values[i - 1]) : values[i];
    };
  };

  // An exponential mean, corrected at its start; weight 0 leaves the values.
  const smoothed = (values, weight) => {
    let sum = 0, seen = 0;
    return values.map((v) => {
      sum = weight * sum + (1 - weight) * v;
      seen = weight * seen + (1 - weight);
      return sum / seen;
    });
  };

  const linesOf = ([step, validation]) => runs.flatMap((run, r) => {
    if (!boxes[r].checked) return [];
    const at = along(run), found = [];
    for (const [columns, dots] of [[run.steps[step], false], [run.validations[validation], true]]) {
      if (!columns || !columns[0].length) continue;
      const [steps, means, low = means, high = means] = columns;
      const weight = dots ? 0 : Number(smooth.value);
      found.push({r, dots, steps, xs: steps.map(at), raw: means, ys: smoothed(means, weight), low, high, weight,
        name: run.name + (dots && run.steps[step] ? " validation" : "")});
    }
    return found;
  });

  const linearTicks = (low, high, most) => {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / size - 1e-9); i * size <= high + 1e-9 * size; i++) found.push(i * size);
    return found;
  };
  const ticks = (low, high, isLog, most) => {
    if (!isLog || high / low < 5) return linearTicks(low, high, most);
    const found = [], every = Math.ceil(Math.log10(high / low) / most), few = high / low < 100;
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += every)
      for (const m of few ? [1, 2, 5] : [1]) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
    return found;
  };

  const range = (values, isLog) => {
    let low = Infinity, high = -Infinity;
    for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
    if (low === 0 && high === 0) high = 1;  // as of an accuracy that has not moved
    if (low === high) { const by = Math.abs(low) * .05; low -= by; high += by; }
    if (isLog) return [low, high];
    return [low - (high - low) * .03, high + (high - low) * .03];
  };

  const draw = (figure) => {
    const plot = figure.querySelector(".plot"), width = plot.clientWidth, height = plot.clientHeight;
    const lines = linesOf(charts[figure.dataset.chart]);
    const values = lines.flatMap((l) => l.weight ? [...l.raw, ...l.ys] : l.raw);
    if (!values.length || width < 90) {
      plot.textContent = values.length ? "" : "no finite value in the runs that are shown";
      figure.view = null;
      return;
    }
    const isLog = log.checked && values.every((v) => v > 0);
    const [low, high] = range(values, isLog), f = isLog ? Math.log : (v) => v;
    let right = 0;  // of all charts: that of the longest run that is shown
    runs.forEach((run, r) => { if (boxes[r].checked) right = Math.max(right, run.axis[UNITS[x.value]].at(-1)); });
    for (const l of lines) for (const v of l.xs) if (v > right) right = v;
    right = right || 1;
    const px = (v) => LEFT + v / right * (width - LEFT - RIGHT);
    const py = (v) => height - BOTTOM - (f(v) - f(low)) / (f(high) - f(low)) * (height - TOP - BOTTOM);
    const clip = (v) => Math.min(Math.max(v, low), high);
    const path = (xs, ys) => xs.map((v, i) => `${i ? "L" : "M"}${px(v).toFixed(1)} ${py(clip(ys[i])).toFixed(1)}`).join("");
    const parts = [];
    for (const t of ticks(low, high, isLog, height > 250 ? 6 : 4))
      parts.push(`<path class="grid" d="M${LEFT} ${py(t)}H${width - RIGHT}"/>`,
        `<text x="${LEFT - 6}" y="${py(t) + 4}" text-anchor="end">${text(t)}</text>`);
    const whole = x.value === "steps" ? Number.isInteger : () => true;
    for (const t of linearTicks(0, right, Math.max(2, Math.floor(width / 110))).filter(whole))
      parts.push(`<text x="${px(t)}" y="${height - BOTTOM + 16}" text-anchor="middle">${text(t)}</text>`);
    parts.push(`<text x="${width - RIGHT}" y="${height - 4}" text-anchor="end">${UNITS[x.value]}` +
      `${log.checked && !isLog ? ", linear scale: values of 0 or less" : ""}</text>`);
    for (const l of lines) {
      const c = `c${l.r % COLOURS}`, dash = DASHES[l.r % DASHES.length];
      if (l.low !== l.raw)
        parts.push(`<path class="band ${c}" d="${path(l.xs, l.high)}${path([...l.xs].reverse(), [...l.low].reverse()).replace("M", "L")}Z"/>`);
      if (l.weight) parts.push(`<path class="line raw ${c}" d="${path(l.xs, l.raw)}"/>`);
      parts.push(`<path class="line ${c}" stroke-dasharray="${dash}" d="${path(l.xs, l.ys)}"/>`);
      if ((l.dots && l.xs.length <= CIRCLES) || l.xs.length === 1)
        l.xs.forEach((v, i) => parts.push(`<circle class="dot ${c}" r="3" cx="${px(v)}" cy="${py(l.ys[i])}"/>`));
    }
    plot.innerHTML = `<svg width="${width}" height="${height}" aria-hidden="true">${parts.join("")}<g class="hover"></g></svg>`;
    figure.view = {lines, px, py, clip, right, width, height};
  };

  const nearest = (xs, value) => {
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - value) < Math.abs(xs[best] - value)) best = i;
    return best;
  };

  // Shows the values nearest to `value` on the x axis; null hides them.
  const point = (figure, value) => {
    const view = figure.view, out = figure.querySelector(".values"), hover = figure.querySelector(".hover");
    out.textContent = "";
    figure.at = value;
    if (!view || !hover) return;
    hover.innerHTML = "";
    if (value === null) return;
    const marks = [`<path class="cursor" d="M${view.px(value)} ${TOP}V${view.height - BOTTOM}"/>`];
    const say = (words, r) => {
      const span = document.createElement("span");
      span.textContent = words;
      if (r !== undefined) span.className = `c${r % COLOURS}`;
      out.append(span, " ");
    };
    say(`${UNITS[x.value]} ${x.value === "steps" ? Math.round(value).toLocaleString("en") : text(value)}`);
    const near = view.right * .02;
    for (const l of view.lines) {
      if (value < l.xs[0] - near || value > l.xs[l.xs.length - 1] + near) continue;
      const i = nearest(l.xs, value), low = l.low[i], high = l.high[i];
      const spread = low !== high ? ` (${text(low)} to ${text(high)})` : "";
      say(`${l.name} ${text(l.raw[i])}${spread}` + (l.dots ? ` at step ${l.steps[i].toLocaleString("en")}` : ""), l.r);
      marks.push(`<circle class="at c${l.r % COLOURS}" r="3.5" cx="${view.px(l.xs[i])}" cy="${view.py(view.clip(l.ys[i]))}"/>`);
    }
    hover.innerHTML = marks.join("");
  };

  const figures = [...document.querySelectorAll(".chart")];
  for (const figure of figures) {
    const plot = figure.querySelector(".plot");
    const follow = (event) => {
      if (!figure.view) return;
      const {right, width} = figure.view;
      const share = (event.clientX - plot.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT);
      point(figure, Math.min(Math.max(share, 0), 1) * right);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") point(figure, null); });
    plot.addEventListener("blur", () => point(figure, null));
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return point(figure, null);
      const by = {ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity}[event.key];
      if (by === undefined || !figure.view) return;
      event.preventDefault();
      const xs = figure.view.lines[0].xs, from = figure.at == null ? (by < 0 ? xs.length : -1) : nearest(xs, figure.at);
      point(figure, xs[Math.min(Math.max(from + by, 0), xs.length - 1)]);
    });
  }

  let waiting = 0;
  const redraw = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => figures.forEach((figure) => { draw(figure); point(figure, null); }));
  };
  for (const input of [x, log, smooth, ...boxes]) input.addEventListener("input", redraw);
  addEventListener("resize", redraw);
  document.querySelectorAll(".run").forEach((label, r) => {
    label.querySelector("path").setAttribute("stroke-dasharray", DASHES[r % DASHES.length]);
  });
  figures.forEach(draw);
})();
