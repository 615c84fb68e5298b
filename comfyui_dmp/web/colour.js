// Gives the links and slots of DMP_PATCH a colour of their own.
import { app } from "../../scripts/app.js";

const TYPE = "DMP_PATCH";
const COLOUR = "#00c2b2";

// ComfyUI empties the colours of all types when it loads a palette. A palette that names a colour
// for this type wins; the accessor keeps ours for all others.
function keep(colours) {
  let chosen = "";
  Object.defineProperty(colours, TYPE, {
    configurable: true,
    enumerable: true,
    get: () => chosen || COLOUR,
    set: (value) => {
      chosen = value;
    },
  });
}

app.registerExtension({
  name: "DMP.Colour",
  setup() {
    keep(app.canvas.default_connection_color_byType);
    keep(app.canvas.constructor.link_type_colors);
    // Nodes in HTML take the colour from the style sheet.
    const style = document.createElement("style");
    style.textContent = `:root { --color-datatype-${TYPE}: ${COLOUR}; }`;
    document.head.append(style);
  },
});
