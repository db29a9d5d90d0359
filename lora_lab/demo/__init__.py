"""The demo's rows: order mails as free text, answers as strict JSON. `orders.py` makes them."""
