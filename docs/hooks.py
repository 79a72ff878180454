"""mkdocs: plots outside docs/ become files of the site; links to other files outside become their text."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)")
IMAGE = re.compile(r"\]\(\.\./([\w./-]+\.png)\)")


def on_files(files, config):
    for page in files.documentation_pages():
        for path in IMAGE.findall(page.content_string):
            if not files.get_file_from_path(path):
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    return IMAGE.sub(r"](\1)", LINK.sub(r"\1", markdown))
