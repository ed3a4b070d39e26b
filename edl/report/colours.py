"""Colours of pages and pictures: even steps of lightness, and hues that all eyes tell apart."""

# Blue and orange differ for every common form of colour blindness. Lightness (OKLab) grows in even steps, away from the
# paper's: little is close to it.
SEQUENTIAL = "#edf8fe #bce0f8 #8fc6f1 #66abe7 #438fd9 #2673c6 #1357af #0b3c93 #092273".split()
SEQUENTIAL_DARK = "#13213b #133662 #004e89 #0a69a1 #0085bd #12a2d6 #1ec0ef #63dbfc #b0f1ff".split()
# From less (blue) over the mean to more (orange).
DIVERGING = "#144097 #2a66b5 #548cc7 #84b0d8 #b9d3e7 #f4f4f4 #e0cbb6 #cca27e #b7774a #a04b12 #7a2a01".split()
DIVERGING_DARK = "#93ddfe #59b8eb #5590bb #4b6b8a #3c495a #2a2a2a #574337 #845e42 #b17c4b #de9e51 #ffc674".split()

# Of lines: the palette of Okabe and Ito.
LINES = "#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00".split()
