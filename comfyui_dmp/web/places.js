// Gives DMP Gate Strength a button with the places at which the patch before it acts.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TEXT = "site_strengths";

let lastPress = null; // Widgets in HTML give their button's function no event to open a menu at.

// The file of the Load DMP Patch node before this one, or nothing.
function fileBefore(node) {
  for (let steps = 0; node && steps < 100; steps++) {
    const file = node.widgets?.find((widget) => widget.name === "patch_name");
    if (file) return file.value;
    const slot = node.inputs?.findIndex((input) => ["dmp_patch", ""].includes(input.name)) ?? -1;
    node = slot < 0 ? null : node.getInputNode(slot);
  }
  return null;
}

async function placesOf(file) {
  if (!file) return { error: "Connect Load DMP Patch to dmp_patch." };
  const response = await api.fetchApi(`/dmp/places?patch=${encodeURIComponent(file)}`);
  return response.json();
}

function add(node, place) {
  const widget = node.widgets.find(({ name }) => name === TEXT);
  const before = String(widget.value ?? "").replace(/[\s,;]+$/, "");
  widget.value = before ? `${before}, ${place}: 1` : `${place}: 1`;
  widget.callback?.(widget.value);
  node.setDirtyCanvas(true, true);
}

async function choose(node) {
  try {
    const { places, error } = await placesOf(fileBefore(node));
    const entries = error ? [{ content: error, disabled: true }] : places;
    new LiteGraph.ContextMenu(entries, {
      event: lastPress,
      title: "Add a place",
      callback: (entry) => add(node, entry?.content ?? entry),
    });
  } catch (problem) {
    console.debug("DMP: the list of places is not available.", problem);
  }
}

app.registerExtension({
  name: "DMP.Places",
  setup() {
    document.addEventListener("pointerdown", (event) => (lastPress = event), true);
  },
  nodeCreated(node) {
    const known = node.comfyClass === "DMP_GateStrength" && typeof node.addWidget === "function";
    if (!known || !node.widgets?.some(({ name }) => name === TEXT)) return;
    // The last widget, and never saved: the values in files go by the order of widgets.
    const options = { serialize: false, advanced: true };
    const button = node.addWidget("button", "add a place", null, () => choose(node), options);
    button.serialize = false;
  },
});
