// Small SVG drawings. Every text reaches the page as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawing(width, height, label) {
  return shape("svg", {
    viewBox: `0 0 ${width} ${height}`, height, preserveAspectRatio: "none",
    role: "img", "aria-label": label,
  });
}

export function digits(value) {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 1 : size >= 1 ? 2 : 3);
}

// One dimension over the steps of a chunk; the band is what the limits allow.
export function trace(values, limits, label) {
  const width = 240, height = 40, edge = 7;
  const [low, high] = limits ?? [Math.min(...values), Math.max(...values)];
  const span = high - low || 1;
  const y = (value) =>
    Math.min(height - 2, Math.max(2, height - edge - ((value - low) / span) * (height - 2 * edge)));
  const x = (step) => 4 + (values.length > 1 ? step / (values.length - 1) : 0) * (width - 8);
  const made = drawing(width, height, label);
  if (limits) {
    made.append(
      shape("rect", { class: "band", x: 0, y: y(high), width, height: y(low) - y(high) }),
      ...[low, high].map((limit) =>
        shape("line", { class: "limit", x1: 0, x2: width, y1: y(limit), y2: y(limit) })),
    );
  }
  made.append(shape("polyline", {
    class: "trace", "vector-effect": "non-scaling-stroke",
    points: values.map((value, step) => `${x(step)},${y(value)}`).join(" "),
  }));
  values.forEach((value, step) => {
    const outside = limits && (value < low || value > high);
    if (step === 0 || outside) {
      made.append(shape("ellipse", {
        class: outside ? "dot outside" : "dot", cx: x(step), cy: y(value), rx: 3, ry: 4,
      }));
    }
  });
  return made;
}

// The last actions' times, newest on the right.
export function strip(recent, deadline, room) {
  const width = 480, height = 110;
  const made = drawing(width, height, `Times of the last ${recent.length} actions`);
  if (!recent.length) return made;
  const most = Math.max(...recent, deadline ?? 0) * 1.1 || 1;
  const step = width / room, first = room - recent.length;
  recent.forEach((ms, index) => {
    const tall = Math.max(1, (ms / most) * height);
    made.append(shape("rect", {
      class: deadline !== null && ms > deadline ? "bar late" : "bar",
      x: (first + index) * step, y: height - tall, width: step * 0.75, height: tall,
    }));
  });
  if (deadline !== null) {
    const y = height - (deadline / most) * height;
    made.append(shape("line", { class: "deadline", x1: 0, x2: width, y1: y, y2: y }));
  }
  return made;
}
