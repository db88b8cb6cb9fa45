"""Manual pages and shell completion, made from the commands' own parsers when the wheel is built.

``python3 -m man DIR`` writes them all below DIR, as they lie below an installation's prefix.
Prose that no parser knows is in the ``*.mdoc`` files, where ``@name@`` on a line of its own stands
for what is generated.
"""
