"use strict";
(() => {
  const root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

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
  // Long tables get a field that hides the rows without its text.
  for (const holder of document.querySelectorAll("main .scroll")) {
    const rows = [...holder.querySelectorAll("tbody tr")];
    if (rows.length <= 12) continue;
    const words = `Search: ${holder.getAttribute("aria-label").toLowerCase()}`;
    holder.before(make("input", { type: "search", class: "search", placeholder: words, "aria-label": words, oninput: (event) => {
      const text = event.target.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(text);
    } }));
  }

  const gallery = document.getElementById("gallery"), source = document.getElementById("data");
  if (!gallery || !source) return;
  const data = JSON.parse(source.textContent);
  const PICTURES = 6, ROWS = 50;
  const state = { policy: data.chosen, label: "", text: "", group: "all", page: 0, row: 0, open: -1 };
  const images = new Map(data.images.map((image) => [image.id, image]));
  const share = new Map();

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

  function marks(picture, kind) {
    const { before, after, isNew } = boxesOf(picture), look = picture.looks[state.policy] ?? { windows: [] };
    const tags = [];
    const layer = draw("svg", { viewBox: `0 0 ${picture.width} ${picture.height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const add = (box, name, words, tag) => {
      const place = { x: box[0], y: box[1], width: Math.max(0, box[2] - box[0]), height: Math.max(0, box[3] - box[1]) };
      layer.append(draw("rect", { ...place, class: "halo" }));
      const rect = draw("rect", { ...place, class: name }), title = draw("title", {});
      title.textContent = words;
      rect.append(title);
      layer.append(rect);
      const side = box[0] < 0.7 * picture.width ? `left:${100 * box[0] / picture.width}%` : `right:${100 - 100 * box[2] / picture.width}%`;
      if (tag) tags.push(make("span", { class: `tag ${name}`, style: `${side};top:${100 * box[1] / picture.height}%` }, tag));
    };
    const wanted = (label) => state.label === "" || String(label) === state.label;
    const tagOf = (box) => `${nameOf(box[5])} ${box[4].toFixed(2)}${isWrong(box) ? ", " + box[7] : ""}`;
    const show = (box, name) => { if (wanted(box[5])) add(box, isWrong(box) ? "wrong" : name, `${nameOf(box[5])} ${box[4].toFixed(2)}${box[7] ? ", " + box[7] : ""}`, tagOf(box)); };
    if (kind === "seen") for (const window of look.windows) add(window, `w${Math.min(window[4], 3)}`, `window at depth ${window[4]}`);
    if (kind === "before") for (const box of before ?? []) show(box, "known");
    if (kind === "after") {
      for (const box of after) show(box, isNew(box) ? "new" : "known");
      for (const object of picture.truth) if (!object[6] && wanted(object[4]) && !after.some((box) => box[7] === "correct" && box[5] === object[4] && overlap(box, object) >= 0.5)) add(object, "missed", `${nameOf(object[4])}, missed`, nameOf(object[4]));
    }
    return [layer, tags];
  }
  const photograph = (picture, alt) => make("img", { src: photo(picture), alt, width: picture.width, height: picture.height, decoding: "async" });
  const mapOf = (picture) => { const map = picture.looks[state.policy]?.map; return map ? [make("img", { src: map, class: "map", alt: "" })] : []; };
  function inWords(picture) {
    const { before, after, isNew } = boxesOf(picture), windows = picture.looks[state.policy]?.windows.length ?? 0;
    const count = (boxes) => boxes.filter((box) => state.label === "" || String(box[5]) === state.label).length;
    const first = data.base ?? "the whole image alone", map = mapOf(picture).length > 0;
    return {
      before: before === null ? "Before: no pass over the whole image alone" : `Before: ${first}, ${count(before)} boxes`,
      seen: `${map ? "Seen: what asked for a closer look, and " : ""}${windows} window${windows === 1 ? "" : "s"}`,
      after: `After: ${state.policy}, ${count(after)} boxes${before === null ? "" : `, ${count(after.filter(isNew))} new`}`,
    };
  }
  function panels(picture) {
    const words = inWords(picture);
    return make("div", { class: "panels" }, ...["before", "seen", "after"].map((kind) => {
      const map = kind === "seen" ? mapOf(picture) : [];
      const holder = make("div", { class: map.length ? "frame dim" : "frame" }, photograph(picture, `${fileOf(picture.id)}. ${words[kind]}`), ...map, marks(picture, kind)[0]);
      return make("div", { class: "panel" }, holder, make("p", {}, words[kind]));
    }));
  }
  const costOf = (id) => images.get(id)?.cost?.[state.policy];
  function verdict(id) {
    const [found, gained, lost] = images.get(id)?.by[state.policy] ?? [0, 0, 0];
    if (!data.truth) return gained === null ? `${found} boxes` : `${found} boxes, ${gained} new by looking closer, ${lost} lost`;
    return compares() ? `${gained} object${gained === 1 ? "" : "s"} gained, ${lost} lost, to ${data.base}` : `${found} objects found`;
  }

  const isWanted = (id) => (state.label === "" || (images.get(id)?.labels ?? []).some((label) => String(label) === state.label)) && pathOf(id).toLowerCase().includes(state.text);
  const shownPictures = () => data.pictures.filter((picture) => (state.group === "all" || picture.group === state.group) && isWanted(picture.id));
  const shownImages = () => data.images.filter((image) => isWanted(image.id)).sort((a, b) => {
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
      make("button", { type: "button", class: "open", "aria-label": `Open ${fileOf(picture.id)}: ${verdict(picture.id)}`, onclick: () => open(from + i) }, panels(picture)))));
    if (!all.length) shots.append(make("li", {}, data.pictures.length ? "No picture of this kind." : "This page holds no pictures."));
    turn(pager, state.page, Math.ceil(all.length / PICTURES), (page) => { state.page = page; showPictures(); shots.scrollIntoView({ block: "start" }); });
    status.textContent = `${all.length} pictures`;
  }
  function showImages() {
    const all = shownImages(), pictured = new Set(data.pictures.map((picture) => picture.id));
    const costs = ["detector MP", "largest zoom"];
    const head = data.truth ? ["image", "objects", "found", "gained", "lost", ...costs] : ["image", "boxes", "new", "lost", ...costs];
    const body = all.slice(state.row * ROWS, state.row * ROWS + ROWS).map((image) => {
      const [found, gained, lost] = image.by[state.policy] ?? [0, 0, 0];
      const [pixels, zoom] = image.cost?.[state.policy] ?? [];
      const cells = [...(data.truth ? [image.objects] : []), found, gained, lost, pixels?.toFixed(2), zoom?.toFixed(2)].map((cell) => cell ?? "\u2013");
      const name = pictured.has(image.id) ? make("button", { type: "button", title: pathOf(image.id), onclick: () => openImage(image.id) }, fileOf(image.id)) : make("span", { title: pathOf(image.id) }, fileOf(image.id));
      return make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, String(cell))));
    });
    list.replaceChildren(make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ...head.map((title) => make("th", { scope: "col" }, title)))), make("tbody", {}, ...body))));
    turn(rowPager, state.row, Math.ceil(all.length / ROWS), (page) => { state.row = page; showImages(); });
  }

  // One picture at the size of the window: both sets of boxes over one photograph, left and right of a slider.
  const MOST = 32;
  const view = { width: 1, height: 1, zoom: 1, x: 0, y: 0, cut: 50 };
  const stage = make("div", { class: "stage no-seen" });
  function place() {
    const frame = stage.firstElementChild, { clientWidth: room, clientHeight: high } = stage;
    if (!frame || !room) return;
    const scale = view.zoom * Math.min(room / view.width, high / view.height), width = scale * view.width, height = scale * view.height;
    const held = (at, side, space) => side <= space ? (space - side) / 2 : Math.min(0, Math.max(space - side, at));
    view.x = held(view.x, width, room);
    view.y = held(view.y, height, high);
    const cut = room * view.cut / 100;
    Object.assign(frame.style, { left: `${view.x}px`, top: `${view.y}px`, width: `${width}px`, height: `${height}px` });
    frame.style.setProperty("--cut", `${cut - view.x}px`);
    stage.style.setProperty("--cut", `${cut}px`);
    // Of tags that would cover each other the first is shown, of the box that scores most.
    for (const layer of frame.querySelectorAll(".layer")) {
      const shown = [];
      for (const tag of layer.querySelectorAll(".tag")) {
        tag.classList.toggle("inside", tag.offsetTop < 18);
        const at = tag.getBoundingClientRect();
        tag.hidden = shown.some((other) => at.left < other.right && other.left < at.right && at.top < other.bottom && other.top < at.bottom);
        if (!tag.hidden) shown.push(at);
      }
    }
  }
  function zoomBy(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
    const zoom = Math.min(MOST, Math.max(1, view.zoom * factor)), ratio = zoom / view.zoom;
    Object.assign(view, { zoom, x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio });
    place();
  }
  const pointOf = (event) => { const at = stage.getBoundingClientRect(); return [event.clientX - at.left, event.clientY - at.top]; };
  stage.addEventListener("wheel", (event) => { event.preventDefault(); zoomBy(Math.exp(-event.deltaY / 400), ...pointOf(event)); }, { passive: false });
  stage.addEventListener("dblclick", (event) => zoomBy(view.zoom > 1 ? 1 / MOST : 4, ...pointOf(event)));
  const fingers = new Map();
  stage.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, pointOf(event)); stage.setPointerCapture(event.pointerId); });
  stage.addEventListener("pointermove", (event) => {
    const from = fingers.get(event.pointerId), to = pointOf(event);
    if (!from) return;
    const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    fingers.set(event.pointerId, to);
    if (others.length) zoomBy(Math.hypot(to[0] - others[0][0], to[1] - others[0][1]) / Math.max(1, Math.hypot(from[0] - others[0][0], from[1] - others[0][1])), ...others[0]);
    else { view.x += to[0] - from[0]; view.y += to[1] - from[1]; place(); }
  });
  for (const kind of ["pointerup", "pointercancel"]) stage.addEventListener(kind, (event) => fingers.delete(event.pointerId));
  addEventListener("resize", place);

  const dialog = make("dialog", { "aria-label": "One picture" });
  let back = null;
  function open(index) {
    const all = shownPictures();
    if (!all.length) return;
    state.open = (index + all.length) % all.length;
    const picture = all[state.open], words = inWords(picture), cost = costOf(picture.id), compared = boxesOf(picture).before !== null;
    if (!dialog.open) back = document.activeElement;
    const key = (sign, name, go) => make("button", { type: "button", "aria-label": name, title: name, onclick: go }, sign);
    const layer = (kind, ...under) => { const [svg, tags] = marks(picture, kind); return make("div", { class: `layer ${kind}` }, ...under, svg, ...tags); };
    const toggle = (name, words) => make("button", { type: "button", "aria-pressed": String(!stage.classList.contains(`no-${name}`)), onclick: (event) => {
      event.currentTarget.setAttribute("aria-pressed", String(!stage.classList.toggle(`no-${name}`)));
      place();
    } }, words);
    stage.replaceChildren(
      make("div", { class: compared ? "frame cut" : "frame" }, photograph(picture, fileOf(picture.id)), layer("seen", ...mapOf(picture)), ...(compared ? [layer("before")] : []), layer("after")),
      ...(compared ? [make("div", { class: "line" })] : []));
    Object.assign(view, { width: picture.width, height: picture.height, zoom: 1 });
    dialog.replaceChildren(make("div", { class: "view" },
      make("header", {}, make("b", { title: pathOf(picture.id) }, fileOf(picture.id)),
        make("span", {}, [verdict(picture.id), ...(cost ? [`${cost[0].toFixed(2)} MP computed, up to ${cost[1].toFixed(2)} times its own resolution`] : []), `${state.open + 1} of ${all.length}`].join(" \u00b7 ")),
        make("div", { class: "keys" }, toggle("boxes", "Boxes"), toggle("seen", words.seen.startsWith("Seen") ? "Map and windows" : "Windows"),
          key("\u2212", "Zoom out", () => zoomBy(0.5)), key("+", "Zoom in", () => zoomBy(2)),
          key("\u2190", "Previous picture", () => open(state.open - 1)), key("\u2192", "Next picture", () => open(state.open + 1)), key("\u2715", "Close", () => dialog.close()))),
      ...(compared ? [make("input", { type: "range", min: 0, max: 100, step: "any", value: view.cut, "aria-label": "Before on the left, after on the right", oninput: (event) => { view.cut = Number(event.target.value); place(); } })] : []),
      stage, make("p", { class: "sides" }, ...(compared ? [make("span", {}, words.before)] : []), make("span", {}, words.after))));
    if (!dialog.open) dialog.showModal();
    place();
    dialog.querySelector(".keys button:last-child").focus();
  }
  function openImage(id) {
    let at = shownPictures().findIndex((picture) => picture.id === id);
    if (at < 0) { choose({ group: "all" }); at = shownPictures().findIndex((picture) => picture.id === id); }
    open(at);
  }
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], factor = { "+": 2, "=": 2, "-": 0.5 }[event.key];
    if (factor) zoomBy(factor);
    // In the slider the arrows move it.
    if (step && event.target.type !== "range") { event.preventDefault(); open(state.open + step); }
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
  bar.append(make("label", {}, "File", make("input", { type: "search", oninput: (event) => choose({ text: event.target.value.toLowerCase() }) })));
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
