"""What a run or a grid came to, as one page: the content (content.py), and its two forms (html.py, markdown.py)."""
