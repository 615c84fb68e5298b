// Lets users type numbers beyond the range of DMP's sliders. When the field of a slider loses the
// focus, gradio moves its number into the range; it does not learn of it for ours.
document.addEventListener(
    "blur",
    function(event) {
        const field = event.target;
        if (field.matches && field.matches(".dmp-free-range input[type=number]") && field.value) {
            event.stopPropagation();
        }
    },
    true,
);
