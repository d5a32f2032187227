"""An endpoint in OpenAI's manner: HTTP requests -> batches of questions -> replies.

limits.py    what a request may ask for, and errors     requests.py   a body -> a question and its sampling
pictures.py  data URLs and files -> bytes               batches.py    what arrives together is answered together
replies.py   replies -> JSON documents and events       app.py        routes, key, bounds
server.py    the listening process                      page.html     a chat page
"""
