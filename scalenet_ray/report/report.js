"use strict";
(() => {
  const root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

  const gallery = document.getElementById("gallery"), source = document.getElementById("data");
  if (!gallery || !source) return;
  const data = JSON.parse(source.textContent);
  const PICTURES = 6, ROWS = 50;
  const state = { policy: data.chosen, label: "", group: "all", page: 0, row: 0, open: -1 };
  const images = new Map(data.images.map((image) => [image.id, image]));
  const share = new Map();

  // Elements are made and filled as text: names of files and classes are never read as HTML.
  function make(tag, attributes = {}, ...content) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...content);
    return element;
  }
  function draw(tag, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }
  const nameOf = (label) => data.categories[label] ?? `category ${label}`;
  const pathOf = (id) => data.files[id] ?? `image ${id}`;
  // The file's own name, or its whole path where another file has the same.
  const ending = (path) => path.slice(path.lastIndexOf("/") + 1);
  const bearers = new Map();
  for (const path of Object.values(data.files)) bearers.set(ending(path), (bearers.get(ending(path)) ?? 0) + 1);
  const fileOf = (id) => bearers.get(ending(pathOf(id))) === 1 ? ending(pathOf(id)) : pathOf(id);

  // One object URL for each photograph, however often it is shown: it is decoded once.
  function photo(picture) {
    if (!share.has(picture.id)) {
      const bytes = Uint8Array.from(atob(picture.photo.slice(picture.photo.indexOf(",") + 1)), (c) => c.charCodeAt(0));
      share.set(picture.id, URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
    }
    return share.get(picture.id);
  }

  const overlap = (a, b) => {
    const w = Math.min(a[2], b[2]) - Math.max(a[0], b[0]), h = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
    if (w <= 0 || h <= 0) return 0;
    const area = (c) => (c[2] - c[0]) * (c[3] - c[1]);
    return w * h / (area(a) + area(b) - w * h);
  };
  const isWrong = (box) => box[7] !== "" && box[7] !== "correct" && box[7] !== "ignored";
  const compares = () => data.base && data.base !== state.policy && data.policies.includes(data.base);
  // What a policy is compared with is the base's boxes, or without another policy those of its own pass over the whole image; null where there is none.
  function boxesOf(picture) {
    return { before: picture.before[state.policy] ?? null, after: picture.boxes[state.policy] ?? [], isNew: (box) => box[8] === 1 };
  }

  function frame(picture, text, kind, large) {
    const { before, after, isNew } = boxesOf(picture), look = picture.looks[state.policy] ?? { windows: [], map: null };
    const tags = [];
    const holder = make("div", { class: kind === "seen" && look.map ? "frame dim" : "frame" });
    holder.append(make("img", { src: photo(picture), alt: text, width: picture.width, height: picture.height, decoding: "async" }));
    if (kind === "seen" && look.map) holder.append(make("img", { src: look.map, class: "map", alt: "" }));
    const layer = draw("svg", { viewBox: `0 0 ${picture.width} ${picture.height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const add = (box, name, words) => {
      const place = { x: box[0], y: box[1], width: Math.max(0, box[2] - box[0]), height: Math.max(0, box[3] - box[1]) };
      layer.append(draw("rect", { ...place, class: "halo" }));
      const rect = draw("rect", { ...place, class: name });
      if (words) { const title = draw("title", {}); title.textContent = words; rect.append(title); }
      layer.append(rect);
      if (large && words && kind !== "seen") tags.push(make("span", { class: `tag ${name}`, style: `left:${100 * place.x / picture.width}%;top:${100 * place.y / picture.height}%` }, words));
    };
    const wanted = (label) => state.label === "" || String(label) === state.label;
    const say = (box) => `${nameOf(box[5])} ${box[4].toFixed(2)}${box[7] ? ", " + box[7] : ""}`;
    if (kind === "seen") for (const window of look.windows) add(window, `w${Math.min(window[4], 3)}`, `window at depth ${window[4]}`);
    if (kind === "before") for (const box of before ?? []) if (wanted(box[5])) add(box, isWrong(box) ? "wrong" : "known", say(box));
    if (kind === "after") {
      for (const box of after) if (wanted(box[5])) add(box, isWrong(box) ? "wrong" : isNew(box) ? "new" : "known", say(box));
      for (const object of picture.truth) if (!object[6] && wanted(object[4]) && !after.some((box) => box[7] === "correct" && box[5] === object[4] && overlap(box, object) >= 0.5)) add(object, "missed", `${nameOf(object[4])}, missed`);
    }
    holder.append(layer, ...tags);
    return holder;
  }
  function panels(picture, large) {
    const { before, after, isNew } = boxesOf(picture), look = picture.looks[state.policy] ?? { windows: [] };
    const count = (boxes) => boxes.filter((box) => state.label === "" || String(box[5]) === state.label).length;
    const first = data.base ?? "the whole image alone";
    const file = fileOf(picture.id), windows = look.windows.length;
    const known = before === null ? "Before: no pass over the whole image alone" : `Before: ${first}, ${count(before)} boxes`;
    const news = before === null ? "" : `, ${count(after.filter(isNew))} new`;
    const rows = [
      ["before", known, before === null ? file : `${file}: ${count(before)} boxes found by ${first}`],
      ["seen", look.map ? `Seen: what asked for a closer look, and ${windows} window${windows === 1 ? "" : "s"}` : `${windows} window${windows === 1 ? "" : "s"}`, `${file}: scale map and ${windows} windows`],
      ["after", `After: ${state.policy}, ${count(after)} boxes${news}`, `${file}: ${count(after)} boxes found by ${state.policy}`],
    ];
    if (large) rows.unshift(["plain", "The photograph", file]);
    const order = large ? ["before", "after", "seen", "plain"] : ["before", "seen", "after"];
    rows.sort((a, b) => order.indexOf(a[0]) - order.indexOf(b[0]));
    return make("div", { class: "panels" }, ...rows.map(([kind, words, alt]) => make("div", { class: "panel" }, frame(picture, alt, kind, large), make("p", {}, words))));
  }
  function verdict(id) {
    const [found, gained, lost] = images.get(id)?.by[state.policy] ?? [0, 0, 0];
    if (!data.truth) return gained === null ? `${found} boxes` : `${found} boxes, ${gained} new by looking closer, ${lost} lost`;
    return compares() ? `${gained} object${gained === 1 ? "" : "s"} gained, ${lost} lost, to ${data.base}` : `${found} objects found`;
  }

  const hasLabel = (id) => state.label === "" || (images.get(id)?.labels ?? []).some((label) => String(label) === state.label);
  const shownPictures = () => data.pictures.filter((picture) => (state.group === "all" || picture.group === state.group) && hasLabel(picture.id));
  const shownImages = () => data.images.filter((image) => hasLabel(image.id)).sort((a, b) => {
    const worth = (image) => { const [, gained, lost] = image.by[state.policy] ?? [0, 0, 0]; return gained - lost; };
    return worth(b) - worth(a);
  });

  const shots = make("ul", { class: "shots" }), pager = make("nav", { class: "pager", "aria-label": "Pages of pictures" });
  const list = make("div"), rowPager = make("nav", { class: "pager", "aria-label": "Pages of the list" });
  const status = make("p", { class: "unseen", role: "status" });
  function turn(holder, page, pages, go) {
    const last = Math.max(0, pages - 1);
    holder.replaceChildren(
      make("button", { type: "button", disabled: page <= 0, onclick: () => go(page - 1) }, "\u2190 Previous"),
      make("span", {}, `${Math.min(page + 1, Math.max(pages, 1))} of ${Math.max(pages, 1)}`),
      make("button", { type: "button", disabled: page >= last, onclick: () => go(page + 1) }, "Next \u2192"),
    );
    holder.hidden = pages <= 1;
  }
  function showPictures() {
    const all = shownPictures(), from = state.page * PICTURES;
    shots.replaceChildren(...all.slice(from, from + PICTURES).map((picture, i) => make("li", { class: "shot" },
      make("header", {}, make("b", { title: pathOf(picture.id) }, fileOf(picture.id)), make("span", {}, verdict(picture.id))),
      make("button", { type: "button", class: "open", "aria-label": `Open ${fileOf(picture.id)}: ${verdict(picture.id)}`, onclick: () => open(from + i) }, panels(picture, false)))));
    if (!all.length) shots.append(make("li", {}, data.pictures.length ? "No picture of this kind." : "This page holds no pictures."));
    turn(pager, state.page, Math.ceil(all.length / PICTURES), (page) => { state.page = page; showPictures(); shots.scrollIntoView({ block: "start" }); });
    status.textContent = `${all.length} pictures`;
  }
  function showImages() {
    const all = shownImages(), pictured = new Set(data.pictures.map((picture) => picture.id));
    const head = data.truth ? ["image", "objects", "found", "gained", "lost"] : ["image", "boxes", "new", "lost"];
    const body = all.slice(state.row * ROWS, state.row * ROWS + ROWS).map((image) => {
      const [found, gained, lost] = image.by[state.policy] ?? [0, 0, 0];
      const cells = (data.truth ? [image.objects, found, gained, lost] : [found, gained, lost]).map((cell) => cell ?? "\u2013");
      const name = pictured.has(image.id) ? make("button", { type: "button", title: pathOf(image.id), onclick: () => openImage(image.id) }, fileOf(image.id)) : make("span", { title: pathOf(image.id) }, fileOf(image.id));
      return make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, String(cell))));
    });
    list.replaceChildren(make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ...head.map((title) => make("th", { scope: "col" }, title)))), make("tbody", {}, ...body))));
    turn(rowPager, state.row, Math.ceil(all.length / ROWS), (page) => { state.row = page; showImages(); });
  }

  // Before and after side by side, as large as both can be seen whole.
  function fit(holder, picture) {
    const width = (innerHeight - 130) * picture.width / picture.height;
    holder.style.setProperty("--fits", `${Math.round(2 * width + 13)}px`);
    return holder;
  }

  const dialog = make("dialog", { "aria-label": "One picture" });
  let back = null;
  function open(index) {
    const all = shownPictures();
    if (!all.length) return;
    state.open = (index + all.length) % all.length;
    const picture = all[state.open];
    if (!dialog.open) back = document.activeElement;
    dialog.replaceChildren(make("div", { class: "view" },
      make("header", {}, make("b", { title: pathOf(picture.id) }, fileOf(picture.id)), make("span", {}, `${verdict(picture.id)} \u00b7 ${state.open + 1} of ${all.length}`),
        make("div", { class: "keys" },
          make("button", { type: "button", "aria-label": "Previous picture", onclick: () => open(state.open - 1) }, "\u2190"),
          make("button", { type: "button", "aria-label": "Next picture", onclick: () => open(state.open + 1) }, "\u2192"),
          make("button", { type: "button", "aria-label": "Close", onclick: () => dialog.close() }, "\u2715"))),
      fit(panels(picture, true), picture)));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    dialog.querySelector(".keys button:last-child").focus();
  }
  function openImage(id) {
    let at = shownPictures().findIndex((picture) => picture.id === id);
    if (at < 0) { choose({ group: "all" }); at = shownPictures().findIndex((picture) => picture.id === id); }
    open(at);
  }
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); open(state.open + step); }
  });
  dialog.addEventListener("close", () => back?.focus());

  const tabs = make("div", { class: "tabs", role: "group", "aria-label": "Which pictures" });
  function showTabs() {
    const kinds = [["all", "All"], ["gained", data.truth ? "Gained most" : "Most new boxes"], ["lost", "Lost most"], ["random", "By chance"]];
    tabs.replaceChildren(...kinds.filter(([kind]) => kind === "all" || data.pictures.some((picture) => picture.group === kind)).map(([kind, words]) =>
      make("button", { type: "button", "data-group": kind, "aria-pressed": String(state.group === kind), onclick: () => choose({ group: kind }) }, words)));
  }
  function choose(changes) {
    const focused = document.activeElement?.dataset?.group;
    Object.assign(state, changes, { page: 0, row: 0 });
    showTabs(); showPictures(); showImages();
    if (focused) tabs.querySelector(`[data-group="${focused}"]`)?.focus();
  }
  function picker(id, words, options, chosen, change) {
    const select = make("select", { id, onchange: (event) => change(event.target.value) }, ...options.map(([value, text]) => make("option", { value, selected: value === chosen }, text)));
    return make("label", { for: id }, words, select);
  }
  const labels = [...new Set(data.images.flatMap((image) => image.labels))].map((label) => [String(label), nameOf(label)]).sort((a, b) => a[1].localeCompare(b[1]));
  const bar = make("div", { class: "bar" }, tabs, picker("class", "Class", [["", "all classes"], ...labels], "", (label) => choose({ label })));
  if (data.policies.length > 1) bar.append(picker("policy", "Policy", data.policies.map((name) => [name, name]), state.policy, (policy) => choose({ policy })));
  const legend = make("ul", { class: "legend" });
  const entries = [["known", data.truth ? "right, known before" : data.compared ? "found in the whole image alone" : "found"], ...(data.truth || data.compared ? [["new", data.truth ? "right, and new" : "new by looking closer"]] : []), ...(data.truth ? [["wrong", "wrong"], ["missed", "missed"]] : []), ["w1", "window"], ["w2", "window in a window"]];
  for (const [name, words] of entries) {
    const sign = draw("svg", { viewBox: "0 0 24 16", "aria-hidden": "true" });
    sign.append(draw("rect", { x: 2, y: 2, width: 20, height: 12, class: name }));
    legend.append(make("li", {}, sign, words));
  }
  legend.append(make("li", {}, `boxes that score ${data.score} or more`));
  const details = make("details", { class: "list" }, make("summary", {}, `Every image (${data.images.length})`), list, rowPager);
  gallery.replaceChildren(bar, legend, status, shots, pager, details, dialog);
  choose({});
})();
