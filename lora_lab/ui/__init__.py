"""`lora-lab ui`: the runs below a folder as pages of HTML, for the browser of this machine. Nothing is changed by them."""
