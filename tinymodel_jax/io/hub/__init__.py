"""The Hugging Face hub: published names, any repository's folders, and uploads.

    published.py    names that the package knows, converted once and kept in its own cache
    addresses.py    `hub:OWNER/NAME/PATH@REVISION`, read from Hugging Face's cache
    folders.py      which files belong to a model or a dictionary
    upload.py       what `push_to_hub` does
    cards.py        the cards of uploaded models and dictionaries
    client.py       what they share

`huggingface_hub` is loaded when something has to be downloaded or uploaded.
"""
