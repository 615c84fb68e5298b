"""The paper's tables in miniature: small bases, made and judged on one computer."""
