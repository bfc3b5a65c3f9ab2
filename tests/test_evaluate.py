"""The grader's truth table, the statistics, the command line, and what an evaluation writes."""
import ast
import base64
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
import torch
from PIL import Image

import data
import evaluate
import kernels
import model as models

REAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "geometry3k"
BOX, TENTH = "[1, 2, 30, 40]", "Find x. Round to the nearest tenth, if necessary."
CHOICES, LENGTHS = ["6", "3", "4", "2"], ["5 cm", "5 m", r"$\frac{13}{2}$ cm", "2√3 cm"]
PICKS = ["green square", "B", "A"]
BOXED, OF_DOG = "Give the bounding box.", [74.0, 302.0, 181.0, 500.0]
COLOURS = ["red", "blue", "green"]
LETTERS = "Which is it?\n(A) red\n(B) blue\n(C) green"

TRUTH = [  # gold, answers that are right, answers that are wrong[, question[, choices]]
    ("5", ["5", " 5 ", "5.", "5.0", "05", "+5", "5,", "**5**", "$5", "$5$", "5.000", "10/2",
           r"\(5\)", r"\[5\]", r"\boxed{5}", "x = 5", "x=5", "$x = 5$", "= 5", r"\text{5}",
           "(5)", "AB = 5", "5 cm", "5 units", "5^\\circ", "5%", r"\frac{10}{2}", r"\sqrt{25}",
           "√25", "500%", "-(-5)", r"x \approx 5", "Area = 5", r"\mathrm{5}"],
     ["6", "5 6", "55", "", " ", "five", "-5", "5/0", "5 or 6", "5, 6", "5 and 6", "5 = 5 = 5 = 6",
      "nan", "inf", "5" * 300, "5 because it is so", "The answer is 5", "5.1", "5.0001", "5 apples",
      BOX, "5±1", "3x = 5", "x/2 = 5", "x = y", "5 5", "[5]", "{5,6}", "(5", "5)", "5e", "0x5",
      "What is x?", r"\boxed{6}", "5$6", r"5\,6", "5j", "sqrt(-25)", "--", "5 ≤ x", "x ≠ 5",
      "0",
      "5²", "2+3", "2 × 2.5", "(2)(2.5)", "10 - 5", "2 + 3 = 5", r"\frac{2+3}{1}", "(2)+(3)"]),
    (r"15\sin{61^\circ}", [r"15\sin{61^\circ}", r"15\sin 61^\circ", "13.12"], ["15", "61", "14.5"]),
    ("24", [r"\frac{12}{\sin 30^\circ}", "24"], [r"\frac{12}{\sin 31^\circ}", "12", "30"]),
    ("60", [r"60 \text{ square centimeters}", "60 square inches"], [r"61 \text{ square units}"]),
    ("16*pi", [r"16\pi \text{ square units}"], [r"16 \text{ square units}"]),
    ("24", ["B", "B 24", "Option B", "option (B)", "[B]", r"\text{(B) } 24", "b: 24", "24"],
     ["C 24", "A 24", "B or C", "[C]", "Option", "C", "36"], "", ["12", "24", "36", "48"]),
    ("5", ["5", "5.0"], ["1", "2", "A", "B"], "", ["1", "2"]),        # the gold is no choice
    ("43", ["43"], ["17 + 26", "17+26", "What is 17 + 26?", "17 + 26 = 43"], "What is 17 + 26?"),
    ("10-12", ["10-12", "10–12"], ["-2", "10", "11"]), ("2020-01-05", ["2020-01-05"], ["2014"]),
    ("7/25", ["7/25", "0.28", "7/ 25"], ["7/25 7/25", "7/ 25 7/25", "25/7", "7/25 or 1"], TENTH),
    ("-5", ["-5", "−5", "–5", "- 5", "x = -5", "-5.0", r"$-5$", "-10/2"],
     ["0-5", "5", "+5", "5-", "(5)", "-50", "-0.5"]),
    ("0", ["0", "0.0", "-0", "0/7", "0%"], ["", "1", "o", "zero", "no", "0/0", "-", "1e-9"]),
    ("10", ["10", "10.", r"10\%", "1e1", "0010"], ["1", "100", "01", "1 0", "1.0", "10%%"]),
    ("1234", ["1,234", "1234", "1234.0", "$1,234", r"1\,234", "1{,}234", r"1,\!234", "1234.00"],
     ["1,23", "1,2345", "1.234", "1 234", "12,34", "234", "1,234,000"]),
    ("1,234,567", ["1234567", "1,234,567"], ["1234", "1,234", "1,234,5670"]),
    ("1000", ["1e3", "10^3", r"1 \times 10^3", "10**3", "10^{3}", "1E3", "1.0e+3"],
     ["1e4", "1e", "e3", "10^30", "10*3", "1e333"]),
    ("1/2", ["0.5", "1/2", "2/4", ".5", "50%", r"\frac{1}{2}", r"\frac12", r"\dfrac{1}{2}",
             r"\tfrac 1 2", "0.50", r"$\frac{1}{2}$", "1 / 2", "2^-1", "2^{-1}", "1÷2"],
     ["0.51", "1/3", "2", "12", "1 2", "5%", "50", "-1/2", "0.4", "1/2/2"]),
    ("13/2", ["6.5", r"\frac{13}{2}", "6 1/2", r"6\frac{1}{2}", r"6\frac12", "6.50", "13/2 cm",
              r"\frac{26}{4}", r"y = \frac{13}{2}", "650%"],
     ["6.4", "7", "6", "13", "2/13", r"\frac{2}{13}", "6.51", "61/2", "132", r"\frac{13}2 3"]),
    ("-13/2", ["-6.5", r"-\frac{13}{2}", "-6 1/2", r"\frac{-13}{2}", r"-6\frac{1}{2}"],
     ["6.5", "-5.5", r"\frac{13}{2}"]),
    ("1/3", ["0.333", "0.3333", "1/3", r"\frac{1}{3}", "2/6", "33.33%"],
     ["0.33", "0.3", "0.34", "3", "33", "0.334"]),
    ("13/3", ["4.33", "4.333", "4 1/3", r"4\frac{1}{3}"], ["4.3", "4", "4.34", "3/13"]),
    ("0.33", ["0.33", "1/3", "0.333", "33%", ".33"], ["0.3", "0.34", "0.4", "3.3", "0.033"]),
    ("0.5", ["0.5", "1/2", "50%", ".5", r"50\%", "0.500"], ["0.51", "0.45", "5", "0.54", "5%"]),
    ("50%", ["50%", "50", "0.5", r"50\%", "1/2", "50 percent"], ["5", "0.05", "500", "51%"]),
    ("18.8", ["18.8", "18.81", "18.80", "18.8 cm", "8√(10-2√5)"], ["18.9", "19", "188", "18"]),
    ("3.14", ["3.14", "pi", "π", "3.142", "22/7"], ["3.1", "3", "314", "3.15", "3.2"]),
    ("pi", ["π", r"\pi", "pi", "3.14", "3.1416", "180pi/180", "22/7"],
     ["3", "3.1", "p", "pie", "3.15", "π²", "2π"]),
    ("2*sqrt(21)", [r"2\sqrt{21}", "2√21", "2 sqrt(21)", "9.165", "9.17", r"2 \cdot \sqrt{21}",
                    r"\sqrt{84}", "√84", r"2\sqrt{21}\text{ cm}", "2*21^(1/2)", "2·21^0.5"],
     ["9", "9.2", "221", r"\sqrt{21}", r"2\sqrt{12}", "2*21", r"\sqrt{2\cdot 21}", "√21/2"]),
    ("5*sqrt(13)", [r"5\sqrt{13}", "18.03", "18.0278", r"\sqrt{325}", "x = 5√13"],
     ["18", "18.1"]),
    (r"\sqrt[3]{8}", ["2", "8^{1/3}", "2.0"], ["8/3", "2.001", r"\sqrt{8}", "-2"]),
    ("-9*sqrt(3)+9*pi/2+114", ["112.55", r"114 + \frac{9\pi}{2} - 9\sqrt{3}", "114+4.5π-9√3"],
     ["114", "113", r"114 + \frac{9\pi}{2} + 9\sqrt{3}", "9*sqrt(3)+9*pi/2+114"]),
    ("15*sin(61*pi/180)", [r"15\sin 61^\circ", r"15 \sin(61^{\circ})", "13.119", "15sin(61°)",
                           r"15 \cos\left(29^\circ\right)"], ["15", "15sin(61)", "13", "15*61"]),
    ("180*asin(2/3)/pi", ["41.81", r"\frac{180}{\pi}\arcsin(2/3)", "41.8°"], ["42", "0.7297"]),
    ("2**(3/4)*sqrt(8)", ["4.757", "2^{3/4}*2√2"], ["4.7", "2"]), ("-3^2", ["-9"], ["9"]),
    ("2^3^2", ["512"], ["64"]), ("64*pi/5", ["64pi/5", r"\frac{64\pi}{5}", "40.2", "12.8π"],
                                 ["64/5", "40", "64", r"\frac{64}{5\pi}", "64+pi/5"]),
    ("12^\\circ", ["12", "12°", r"12^{\circ}", "12 degrees", r"12\degree", "m∠A = 12°", "12∘",
                   r"m\angle ABC = 12", "m∠1 = 12"], ["12 cm", "120", "12°C", "12%", "12°°", "°"]),
    ("5 cm", ["5", "5cm", "5 centimeters", "5.0 cm", r"5\text{ cm}", r"5\mathrm{~cm}", "5 CM."],
     ["5 m", "5 mm", "5 cm^2", "5 km", "6 cm", "5°", "cm", "5 cmm"]),
    ("60 cm^2", ["60", "60 cm²", "60 square centimeters", r"60\text{ cm}^2", "60 sq. cm",
                 "60 cm^{2}", "60 sq cm"], ["60 cm", "60 m^2", "60 cm^3", "60^2", "6 cm^2"]),
    ("12 in", ["12 inches", "12in.", "12", "12 inch"], ["12 ft", "12 feet", "1 foot", "12 m"]),
    ("8*sqrt(10-2*sqrt(5))", ["18.8", "18.81", "18.809", r"8\sqrt{10-2\sqrt{5}}", "x = 18.8",
                              "18.76"], ["18.9", "19", "18", "18.7", "18.86"], TENTH),
    ("25/4", ["6.3", "6.25", "25/4", "6 1/4"], ["6.2", "6", "6.4"], TENTH),
    ("-25/4", ["-6.2", "-6.25"], ["-6.3", "-6", "6.2"], TENTH),
    ("12/13", ["0.92", "12/13", "0.923", "92%"], ["0.93", "0.9", "1"],
     r"Express the ratio of \cos A as a decimal to the nearest hundredth."),
    ("180*acos(12/13)/pi", ["23", "22.6", "23°", r"23^\circ"], ["22", "24", "2"],
     "What is the measure of angle A, to the nearest degree?"),
    ("2*sqrt(5)", ["4", "4.47", "2√5"], ["5", "4.5"], "Round to the nearest whole number."),
    ("7.4638", ["7.464", "7.4638"], ["7.463", "7.46"], "Answer to the nearest thousandth."),
    ("7.5", ["7.5", "15/2"], ["8", "7"], "Which tree is nearest the house?"),
    ("Yes", ["yes", "YES", "yes.", " yes ", "'yes'", r"\text{Yes}", "**Yes**", "$yes$", "y = yes"],
     ["no", "yes no", "", ".", "yes, because", "0", "1", "ye s"]),
    ("dark red", ["dark  red", "Dark red.", "dark\nred", '"Dark Red"'], ["red", "dark", "darkred"]),
    ("5 apples", ["5 apples", "5 Apples."], ["5", "apples", "5 cm", "6 apples"]),
    ("9" * 30, ["9" * 30], ["9" * 29 + "8", "9" * 31, "1e30"]),
    # A box only where row or question says so: without BOXED any list of four numbers was one.
    (BOX, [BOX, "[2,2,30,40]", "[1.0, 2.0, 30.5, 40]", r"\boxed{[1, 2, 30, 40]}"],
     ["[30, 40, 1, 2]", "[0, 0, 90, 90]", "[1, 2, 30]", "5", "1, 2, 30, 40", f"{BOX} {BOX}"],
     BOXED),
    *[(gold, ["C", "c", "(C)", "C.", "4", "(C) 4", "C: 4", "C) 4", r"\text{C}", r"\textbf{(C)}",
              "$4$", "4.0", "x = 4", r"\boxed{C}", r"C. $\frac{8}{2}$", "4 cm"],
       ["(C) 3", "B", "3", "E", "", "C or B", "Cat", "C) B", "5", "A, B, C, D", "34", "Z", "?"], "",
       CHOICES) for gold in ("4", "C", "(C)", r"\boxed{C}")],
    ("A", ["5 cm", "A", "(A) 5 cm"], ["5", "5 m", "B", "5 mm", "6.5"], "", LENGTHS),
    ("C", ["13/2", "6.5 cm", r"\frac{13}{2}", "c"], ["13", "6", "6.5 m", "3.46"], "", LENGTHS),
    (r"2\sqrt{3} cm", ["D", "3.464", "(D) 2√3 cm"], ["3", "2√3 m", "(C) 2√3"], "", LENGTHS),
    ("green square", ["A) Green square", "Green square."], ["green", "B", "A", "C"], "", PICKS)]

MORE = [  # what the rules of `clean` and of `number` serve, and what they must not let through
    ("1024", ["2¹⁰", "2^{10}", "２^10", "１０２４", "1,024"],
     ["210", "2¹", "2¹¹", "2*10"]),
    ("16", ["2⁴", "4²", r"4^{2}"], ["24", "42", "2^5", "8+8", "4*4", r"4 \times 4", r"4\cdot4"]),
    ("13/2", ["6+1/2", r"\frac{13}2", r"\left(\frac{13}{2}\right)", r"x=6\,\frac{1}{2}"],
     ["6½ or 7", r"6\cdot\frac{1}{2}", r"\frac{13}", r"\frac{13}{2", r"\frac13", "7-1/2"]),
    ("2", [r"1/\frac12", r"\frac{1}{\frac{1}{2}}", r"4^{\frac12}", r"\sqrt{\frac{8}{2}}"],
     [r"\frac12", "10*0.2", "4*(1/2)", r"\frac{1}{2}\cdot 4", "2,2"]),
    ("1/6", [r"\frac{\frac{1}{2}}{3}", r"\frac1{6}", "1÷6", r"1\div6", "16.67%"],
     [r"\frac{1}{\frac{2}{3}}", "6", "1/2/3/4"]),
    ("sqrt(3)/2", [r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt3}2", "√3/2", r"\sin 60°", "sin(60°)"],
     [r"\sqrt{\frac{3}{2}}", "3/2", "sin(60)", "√(3/2)"]),
    ("pi/2", [r"\frac\pi2", r"\frac{\pi}{2}", r"\arcsin(1)", "asin(1)", "π÷2"],
     ["π2", "π^2", "2/π"]),
    ("45", ["45º", "45 deg", r"\angle B = 45^{∘}", "45 degrees", r"180\arctan(1)/\pi"],
     ["45°F", r"\arctan 1", "0.45%"]),
    ("3 ft", ["3 feet", "3 foot", "3ft.", "3"], ["3 in", "3 yards", "1 yd", "36 in", "3 ft^2"]),
    ("B", ["{B}", r"\boxed{{B}}", "choice b", "B: 3", "3", r"\textbf{(B)}"],
     ["{C}", "b c", "BB", "B 4", "option", "2"], "", CHOICES),
    ("[0, 0, 10, 10]", ["[0,0,10,19.9]", "[0,4.9,10,10]", "[ 0, 0, 10.0, 10 ]", "[-5, 0, 10, 10]"],
     ["[0, 0, 10, 20]", "[0, 5, 10, 10]", "[10, 10, 0, 0]", "[0, 0, 0, 0]", "[0, 0, 1e1, 10]"],
     "Where is it? Answer with bbox coordinates."),          # as above
    ("[0, 0, 0, 0]", ["[0, 0, 0, 0]"], ["[0,0,1,1]", "[1, 1, 1, 1]"])]


MISREAD = [  # what users brought and what was silently read as something else, with its siblings
    # what stands before «=» was dropped on both sides; spaces around it mean nothing
    ("x = 3", ["x=3", r"\(x=3\)", "3", "= 3", "x = 6/2", "X = 3", "$x = 3.0$", "**x = 3**"],
     ["y = 3", "x = 4", "x = -3", "-x = 3", "2x = 3", "x = 3 or x = 4", "xx = 3", "x > 3", "x"]),
    ("AB = CD", ["AB=CD", "$AB = CD$", r"\(AB=CD\)"], ["EF = CD", "AB = EF", "AB", "EF=CD"]),
    ("y=2x+1", ["y = 2x + 1", "y = 2x+1", "$y=2x+1$", "Y = 2X + 1"],
     ["y=2x-1", "y = 2x", "y = x+1", "z = 2x+1", "y = 2x+11", "y = 12x+1"]),
    ("m∠A = 30°", ["m∠A=30", r"m\angle A = 30^\circ", "30°", "30 degrees", "m ∠A = 30"],
     ["m∠B = 30°", "m∠A = 31°", r"m\angle B = 30", "m∠A = 30 cm"]),
    # end marks that mean something, and the many ways to write them
    ("A′", ["A'", "A’", "$A'$", "A′."], ["A", "A″", "B′", "A′′", "A!"]),
    ("f'(x)", ["f′(x)", "f’(x)", "$f'(x)$"], ["f(x)", "f''(x)", "g'(x)", "f″(x)"]),
    ("5″", ['5"', "5 in", "5 inches", "5''", "5”", "5"], ["5′", "5'", "5 ft", "5 cm", "6″"]),
    ("6'", ["6′", "6 ft", "6 feet", "6’", "6"], ['6"', "6″", "6 inches", "60'", "6''"]),
    ("2 in", ["2″", '2"', "2 inch"], ["2′", "2'", "2 ft"]),
    ("5", ["5?"], ["5!", "5!!", "3!", "!5"]), ("120", ["120"], ["5!", "120!"]),
    # «nearest unit» and «decimals» said of the answer, or of what is given
    ("18.8", ["18.8", "18.81"], ["19", "18.9"],
     "The distance is given to the nearest foot. What is the height?"),
    ("24.36", ["24.36"], ["24.4", "24"], "A side, measured to the nearest tenth, is 4.9. Area?"),
    ("12.4", ["12.4"], ["12", "12.0"], "The lengths are rounded to the nearest inch. The area?"),
    ("12.4", ["12.4"], ["12", "12.3"], "Lengths are shown to the nearest centimeter. The area?"),
    ("12.4", ["12.4", "12"], ["13", "11"], "Lengths are given to the nearest tenth. Find the area, "
     "to the nearest inch."),
    ("3.14159", ["3.14", "3.142"], ["3.1", "3.15", "3"], "Give the answer to two decimal places."),
    ("3.14159", ["3.14", "3.1416"], ["3.1", "3.13"], "Round to 2 decimal places."),
    ("2/3", ["0.667", "2/3"], ["0.67", "0.66", "0.7"], "Answer to three decimal places."),
    ("0.456", ["0.5", "0.46"], ["0.4", "1"], "Give it with 1 decimal."),
    # Markdown, quotes, exclamations
    ("Yes", ["Yes!", "*Yes*", "Yes!!", "“Yes”", "‘yes’", "`yes`", "**Yes**.", "**Yes.**"],
     ["No!", "yes or no", "Yes, no", "**No**", "yes?no", "**Yes** **no**"]),
    ("“dark red”", ["dark red", '"dark red"', "‘Dark red’", "**dark red**"], ["red", "“dark”"]),
    ("don't", ["don’t", "Don‘t"], ["dont", "do", "don t"]),
    ("7", ["`7`", "*7*", "“7”", "**x = 7**", "$$7$$", "7;", "7 units", "**$7$**"],
     ["7 or 8", "7?8", "7:8", "7/", "about 7", "It is 7", "7 people", "**7** **8**", "**8**"]),
    # a letter where the choices stand only in the question
    *[(gold, ["B", "(B)", "b)", "**B**", "**(B)**", "Answer: B", "The answer is **B**", "[B]",
              "The answer is B.", "Option B", "choice (B)", "The correct answer is (B)", "“B”",
              "final answer: B", "The answer is: B", "**Answer: B**", r"\textbf{B}"],
       ["C", "A or B", "Answer: C", "The answer is **C**", "B or C", "A, B", "AB", "not B", "B C",
        "The answer is not B", "Answer: B or C", "BB", "b = c", "Because", "A/B",
        "I choose B not A", "The answer is C, not B", "B and C"], LETTERS)
      for gold in ("B", "(B)")],
    *[(gold, ["B", "The answer is **B**", "(B) blue", "B: blue", "**B** blue", "**B. blue**",
              "The answer is (B) blue", "The answer is blue", "Answer: **blue**", "**(B)** blue"],
       ["C", "red", "(B) red", "B or C", "The answer is **C**", "the answer is red", "(C) blue",
        "the sky is blue", "blue or red", "not blue", "A: blue"], LETTERS, COLOURS)
      for gold in ("B", "blue", "(B) blue")],
    ("answer", ["answer", "B", "the answer is B"], ["A", "question", "the answer is A"], "",
     ["question", "answer"]),
    ("x = 3", ["x=3", "B", "3", "(B) x = 3"], ["y = 3", "x = 2", "A", "(A) x = 3"], "",
     ["x = 2", "x = 3"]),
    ("EF = CD", ["EF=CD", "B"], ["AB = CD", "AB=CD", "A", "GH = CD"], "", ["AB = CD", "EF = CD"]),
    ("¾", ["B", "0.75", "3/4", r"\frac34"], ["A", "¼", "7/4", "B ¼"], "", ["¼", "¾"]),
    ("$5", ["A", "5 dollars", "$5.00"], ["€5", "B", "5 €"], "", ["$5", "€5"]),
    # spaces that mean nothing
    ("2:3", ["2 : 3", "2 :3", "$2:3$"], ["3:2", "2:4", "2 3", "23", "4:6:1"]),
    ("{1, 2}", ["{1,2}", r"\{1, 2\}", "{ 1 , 2 }"], ["{1,3}", "{12}", "{1,2,3}", "1", "(1, 2)"]),
    ("(3, 4)", ["(3,4)", "( 3 , 4 )", r"\left(3, 4\right)"], ["(4,3)", "(34)", "3", "[3,4]"]),
    ("x > 3", ["x>3", "$x>3$"], ["x<3", "x ≥ 3", "3", "x > 4"]),
    # LaTeX and Unicode for the same
    (r"x \le 3", ["x ≤ 3", "x≤3", r"x \leq 3", r"$x\le3$"], ["x ≥ 3", r"x \ge 3", "x<3", "3"]),
    (r"x \neq 3", ["x ≠ 3", r"x\ne3", "x≠3"], ["x = 3", "3", "x ≠ 4"]),
    (r"\pm 2", ["±2", "± 2", r"$\pm2$"], ["2", "-2", "+2", r"\pm 3", "∓2"]),
    (r"\infty", ["∞", r"$\infty$"], ["-∞", "0", r"-\infty", "8"]),
    (r"\angle ABC", ["∠ABC", "∠ ABC"], ["∠ABD", "ABC", r"\angle AB"]),
    (r"AB \perp CD", ["AB ⊥ CD", "AB⊥CD"], ["AB ∥ CD", "CD", "AB"]),
    ("12°", ["$ 12 $", r"$ 12^\circ $", "12 º", "１２°"], ["$ 13 $", "$ 12 $ or 13", "12′"]),
    # vulgar fractions, superscripts, roots, full width
    ("½", ["1/2", "0.5", r"\frac12", "50%", "1⁄2"], ["1/3", "¼", "12", "2", "1½"]),
    ("13/2", ["6½", "6 ½", "6½ cm"], ["6¼", "½", "7½", "6½½"]),
    ("-5/2", ["-2½", "−2½", "-2 ½"], ["2½", "-1.5", "-2¼"]), ("2/3", ["⅔", "2⁄3"], ["⅓", "3/2"]),
    ("10000", ["10⁴", "1 × 10⁴", "１００００"], ["104", "10³", "10⁵", "10⁻⁴"]),
    ("1/100", ["10⁻²", "10^{-2}", "1e-2"], ["10²", "10-2", "-100", "10⁻³"]),
    ("x^2+1", ["x² + 1", "x^{2}+1", "$x^2+1$"], ["x²-1", "x2+1", "2x+1"]),
    ("∛2", [r"\sqrt[3]{2}", "2^{1/3}", "1.26", "∛(2)"], ["√2", "3√2", "2", "1.3"]),
    ("2", ["∛8", "∛(8)", "2∛1", "√4"], ["√8", "∛9", "∛"]),
    ("3/4", ["３／４", "¾", "３÷４"], ["４／３", "３４"]), ("A", ["Ａ", "（Ａ）"], ["Ｂ", "ＡＢ"]),
    # units beyond lengths; areas and volumes
    ("3 kg", ["3", "3kg", "3 kilograms", "3 KG"], ["3 g", "3 lb", "4 kg", "3000 g", "3 kg 2"]),
    ("3", ["3 kg", "3 L", "3 hours", "3 mph", "3 km/h"], ["3 apples", "4 kg", "3 kg and 3 g"]),
    ("20 s", ["20 seconds", "20 sec", "20"], ["20 min", "20 h", "1/3 min"]),
    ("2 h", ["2 hours", "2 hrs", "2"], ["120", "120 min", "2 min"]),
    ("3 km", ["3 kilometres", "3 kilometers"], ["3 m", "3 miles", "3000 m"]),
    ("500 ml", ["500", "500 mL", "500 milliliters"], ["0.5 l", "500 l", "50"]),
    ("5 m/s", ["5", "5m/s"], ["5 m", "5 s", "5 km/h", "5 m/s^2"]),
    ("6 m^2", ["6 m²", "6 square meters", "6 sq. m", "6"], ["6 m", "6 m³", "6 cm²", "36"]),
    ("27 cm^3", ["27 cm³", "27 cubic centimeters", "27"], ["27 cm", "27 cm²", "27 cubic m"]),
    # money
    ("$5.50", ["5.50", "5.5", "$ 5.50", r"\$5.50", "5.50 dollars", "5.5 USD"],
     ["€5.50", "£5.50", "$5.05", "$550", "5.50 €", "$5.50 or $6"]),
    ("€20", ["20", "20 €", "€ 20", "20 euros"], ["$20", "£20", "200", "20 dollars"]),
    ("£1,250", ["1250", "£1250", "1,250 £"], ["$1250", "£125", "€1,250"]),
    # large numbers to the last digit; powers of ten
    ("12345678901234567890", ["12,345,678,901,234,567,890", "+12345678901234567890"],
     ["12345678901234567891", "12345678901234567880", "1234567890123456789"]),
    ("1,000,000,000,001", ["1000000000001", "$1000000000001$"], ["1000000000000", "1e12"]),
    ("9007199254740993", ["9,007,199,254,740,993"], ["9007199254740992", "9007199254740994"]),
    ("1e20", ["100000000000000000000", "10^20"], ["100000000000000000001", "1e21", "10^19"]),
    ("1200", ["1.2 x 10^3", "1.2x10^3", "1.2 × 10³", r"1.2 \times 10^{3}", r"1.2\cdot10^3"],
     ["1.2 x 10^4", "12 x 100", "1.2 x 3", "1.2x", "1.2 x 1000"]),
    ("0.0012", ["1.2 x 10^-3", "1.2 × 10⁻³", r"1.2 \times 10^{-3}"], ["1.2 x 10^3", "1.2 × 10⁻⁴"]),
    # boxes as Qwen2.5-VL writes them; four numbers that are a list
    (str(OF_DOG), ["[74,302,181,500]", '{"bbox_2d": [74, 302, 181, 500]}', "[70, 300, 180, 500]",
                   '[{"bbox_2d": [74, 302, 181, 500], "label": "dog"}]',
                   '```json\n[{"bbox_2d": [74, 302, 181, 500], "label": "dog"}]\n```',
                   '```json\n{"bbox_2d": [80, 310, 181, 500]}\n```',
                   '<answer>{"bbox_2d":[74,302,181,500],"label":"dog"}</answer>'],
     ['{"bbox_2d": [0, 0, 10, 10]}', '{"bbox_2d": []}', '{"bbox_2d": [74, 302, 181]}', "the dog",
      '{"label": "dog"}', "[181, 500, 74, 302]", "[74, 302, 181, 500] or [0, 0, 1, 1]",
      '[{"bbox_2d": [74, 302, 181, 500]}, {"bbox_2d": [0, 0, 1, 1]}]'], "Give the dog's bbox_2d."),
    ("[1, 2, 3, 4]", ["[1,2,3,4]", "[ 1, 2, 3, 4 ]", r"\[[1, 2, 3, 4]\]"],
     ["[1, 2, 3, 5]", "[1, 2, 3, 4.1]", "[0, 2, 3, 4]", "[4, 3, 2, 1]", "[1,2,3]"],
     "List the first four numbers."),
    ("[0, 0, 100, 100]", ["[0,0,100,100]"], ["[0, 0, 100, 99]", "[1, 0, 100, 100]"]),
    # a template had written the <think>: nothing before the last </think> is the answer
    ("4", ["</think> 4", "I think 5</think> 4", "2 + 2\n</think>\n4", "</think><answer>4</answer>",
           r"\boxed{5}</think> 4", r"\boxed{5}</think>\boxed{4}", "<think>a</think>b</think>4",
           "<answer>5</answer></think>\n\n**4**", "</think>x = 4"],
     ["4</think> 5", "4</think>", r"\boxed{4}</think>", r"\boxed{4}</think> 5", "<think>4",
      "<answer>4</answer></think>5", "<think>4</think>", "4</think>I do not know",
      r"<think>\boxed{4}", "<answer>4</answer></think>", "</think>4</think>5"]),
    # two answers are none, but where the gold says two
    ("3 or 4", ["3 or 4", "**3 or 4**"], ["3", "4", "4 or 5", "3 and 4"]),
    ("75%", ["75 percent", r"75\%", "0.75", "75 %"], ["7.5%", "74%", "0.075", "75 or 80%"])]

ROWS = TRUTH + MORE + MISREAD


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_truth(row):
    gold, right, wrong, question, choices = (*row, "", None)[:5]
    for expected, answers in ((True, right), (False, wrong)):
        for answer in answers:
            assert is_right(answer, gold, choices, question) == expected, answer


@pytest.mark.parametrize("rows, least", [(TRUTH + MORE, 800), (MISREAD, 200)])
def test_truth_is_large_and_balanced(rows, least):
    right, wrong = (sum(len(row[i]) for row in rows) for i in (1, 2))
    assert right + wrong > least and abs(right - wrong) < 0.2 * (right + wrong)
    for row in rows:
        answers = row[1] + row[2]
        assert len(answers) == len(set(answers)), f"{row[0]}: twice the same pair"


UNITS = [("mm", "millimeters"), ("cm", "centimetres"), ("m", "metre"), ("km", "kilometers"),
         ("in", "inches"), ("ft", "feet"), ("yd", "yards"), ("mi", "miles"), ("°", "degrees"),
         ("%", "percent"), ("mg", "milligrams"), ("g", "grams"), ("kg", "kilogram"),
         ("lb", "pounds"), ("L", "litres"), ("s", "seconds"), ("min", "minutes"), ("h", "hrs"),
         ("day", "days"), ("year", "years"), ("m/s", "m/s"), ("km/h", "kph"), ("mph", "mph"),
         ("dollar", "USD"), ("€", "euros"), ("£", "GBP")]


@pytest.mark.parametrize("unit, spelled", UNITS, ids=[unit for unit, _ in UNITS])
def test_units(unit, spelled):
    """«3 kg» for the gold 3 was wrong, for only lengths were units; «3 g» for 3 kg stays wrong."""
    for right, gold in itertools.permutations(["7", f"7 {unit}", f"7 {spelled}", f"7{unit}"], 2):
        assert is_right(right, gold), (right, gold)
    others = [other for other, _ in UNITS if other != unit]
    for wrong in [*(f"7 {other}" for other in others), f"7 {unit}^2", f"8 {unit}", f"7 {unit} 7"]:
        assert not is_right(wrong, f"7 {unit}"), wrong


@pytest.mark.parametrize("name, sign", [
    ("pm", "±"), ("le", "≤"), ("leq", "≤"), ("ge", "≥"), ("geq", "≥"), ("ne", "≠"), ("neq", "≠"),
    ("infty", "∞"), ("angle", "∠"), ("perp", "⊥"), ("times", "×"), ("cdot", "·"), ("div", "÷"),
    ("degree", "°"), ("circ", "°")])
def test_latex_reads_as_its_sign(name, sign):
    """«a ≤ b» was wrong for the gold «a \\le b», and the other way round."""
    for latex in (rf"a \{name} b", rf"$a\{name} b$", rf"\(a \{name}  b\)"):
        assert is_right(latex, f"a {sign} b") and is_right(f"a {sign} b", latex)
        assert not is_right(latex, "a b") and not is_right("b", latex)


RULES = [(name, i) for name in ("PLAIN", "FORMULA") for i in range(len(getattr(evaluate, name)))]


@pytest.mark.parametrize("name, i", RULES, ids=[f"{name}-{i}" for name, i in RULES])
def test_rule(name, i, monkeypatch):
    """The example of each rule reads as it says, and does so no longer without that rule."""
    def read(text):
        return evaluate.clean(text) if name == "PLAIN" else evaluate.rewrite(text, evaluate.FORMULA)

    rules = getattr(evaluate, name)
    _, _, before, after = rules[i]
    assert read(before) == after
    monkeypatch.setattr(evaluate, name, rules[:i] + rules[i + 1:])
    assert read(before) != after


@pytest.mark.parametrize("sign, plain", evaluate.SIGNS.items(), ids=map(chr, evaluate.SIGNS))
def test_sign(sign, plain):
    plain = plain if isinstance(plain, str) else chr(plain)
    assert evaluate.clean(f"7{chr(sign)}8") == f"7{plain}8"



def is_right(answer, gold, choices=None, question="", box=False):
    example = data.Example("", question, gold, choices=choices, box=box)
    return evaluate.judge(answer, example) is True

def test_unicode_is_plain_but_exponents_stay_exponents():
    assert evaluate.clean("Ｙｅｓ\u00a0５") == "yes 5"
    assert evaluate.clean("x³") == "x^3" and evaluate.clean("5 m²") == "5 m^2"
    assert evaluate.number(evaluate.clean("6½")) == (6.5, ""), "NFKC alone would make it 61/2"


@pytest.mark.parametrize("text, value", [
    ("5", 5), ("0.1", Fraction(1, 10)), ("1e3", 1000), (".5", Fraction(1, 2)), ("5.", 5),
    ("-5", -5), ("+5", 5), ("--5", 5), ("3/4", Fraction(3, 4)), ("2**3", 8), ("2**-1", 0.5),
    ("-3**2", -9), ("2**3**2", 512), ("6+1/2", Fraction(13, 2)), ("pi", math.pi),
    ("2*pi", 2 * math.pi), ("1+pi-3", math.pi - 2), ("frac(1, 2)", Fraction(1, 2)),
    ("sqrt(16)", 4), ("cbrt(27)", 3), ("sin(pi/2)", 1), ("cos(0)", 1), ("tan(0)", 0),
    ("asin(1)", math.pi / 2), ("acos(1)", 0), ("atan(0)", 0)])
def test_value(text, value):
    """Every kind of node that a number may have; exact values stay exact."""
    found = evaluate.value(ast.parse(text, mode="eval").body)
    assert math.isclose(found, value, rel_tol=1e-15, abs_tol=1e-15)
    assert isinstance(found, Fraction) or not isinstance(value, Fraction)


@pytest.mark.parametrize("text", [
    "__import__('os')", "__import__('os').system('echo')", "lambda: 5", "(5).real", "math.pi",
    "1 < 2", "1 if 2 else 3", "1 and 2", "not 1", "True", "None", "...", "5j", "'5'", "b'5'",
    "f'5'", "x", "e", "tau", "exp(1)", "eval(5)", "pow(2, 3)", "sqrt", "pi(5)", "sqrt()",
    "sqrt(4, 9)", "sqrt(x=4)", "sqrt(*[4])", "frac(1)", "frac(1, 2, 3)", "sqrt(4)(5)", "(1, 2)",
    "[5]", "{5}", "{5: 5}", "[5][0]", "[x for x in (5,)]", "(x := 5)", "7 // 2", "7 % 2", "~5",
    "1 << 2", "1 | 2", "1 @ 2", "2 + 3", "2 * 3", "10 - 5", "5 + 0", "6 - 1/2", "10 * 0.5", "1e999",
    "sqrt(2 + 2)", "sqrt(-1)", "(-8)**(1/3)", "1/0", "asin(2)", "9**9**9**9", "5.0.real"])
def test_no_value(text):
    """No other node, name or operation, nothing to work out, nothing undefined."""
    with pytest.raises((ValueError, ArithmeticError, TypeError)):
        evaluate.value(ast.parse(text, mode="eval").body)
    assert evaluate.number(text) is None or text in ("pi(5)", "sqrt(4)(5)", "{5}"), "a product, (5)"


@pytest.mark.parametrize("text", [
    "9**9**9**9", "9^9^9^9", "9^9^9", "1e333", "1e-333", "1e99999999", "1e-99999999", "1e400-1e400",
    "(" * 200 + "5" + ")" * 199, "(" * 199 + "5" + ")" * 200, "(" * 400, "-" * 399 + "5",
    "2^" * 199 + "2", "√" * 399 + "4", "sqrt(" * 66 + "4" + ")" * 65, "1/" * 199 + "1", "5" * 400,
    "-" * 120 + "5", "1/7" * 130, "9e99*pi*" * 4 + "1", "\x00", "5\x00", "5\n6", "", " ", "(5,)",
    "5,", "5_0", "0x5", "0b1", "5 or 6", "5or 6", "5 if 1 else 2", "5#6", "5;6", "5\\",
    "5//2", "5**", "()", "sqrt(5,)(", "1" * 401, "pi " * 133 + "pi"])
def test_bounds(text):
    """Long, deep and large ends at once and is no number; so does what only Python would read."""
    begin = time.process_time()
    assert evaluate.number(text) is None
    assert evaluate.number(evaluate.clean(text)) is None or text in ("5,", "5**")
    assert time.process_time() - begin < 1
    assert is_right(text, "5") in (True, False)


@pytest.mark.parametrize("depth", [evaluate.MAX_DEPTH, evaluate.MAX_DEPTH + 1])
def test_depth(depth):
    assert (evaluate.number("-" * depth + "5") is None) == (depth > evaluate.MAX_DEPTH)


def test_largest_and_longest():
    """Numbers over 10¹² were texts, and 1,000,000,000,001 was not 1000000000001."""
    assert evaluate.number("1" + "0" * 100) and not evaluate.number("1" + "0" * 99 + "1")
    assert is_right("5" + " " * 399, "5") and not is_right("5" + " " * 400, "5")
    assert evaluate.number("5" + " " * 399) and not evaluate.number("5" + " " * 400)


def test_repeating_the_question_is_wrong():
    for gold, _, _, *asked in ROWS:
        if asked and asked[0]:
            assert not is_right(asked[0], gold, *asked[1:] or [None], asked[0])


@pytest.mark.parametrize("text, answer", [
    ("5", "5"), ("<think>4</think>5", "5"), (r"\boxed{5}", "5"), (r"so \boxed{5}.", "5"),
    (r"\boxed{4} and \boxed{5}", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"<think>\boxed{4}</think>\boxed{ 5 }", "5"), (r"<answer>\boxed{5}</answer>", "5"),
    (r"\boxed{4} <answer>5</answer>", "5"), ("<answer>4</answer><answer> 5 </answer>", "5"),
    (r"\boxed{\boxed{5}}", "5"), (r"\boxed{5", r"\boxed{5"), (r"<think>\boxed{5}</think>", ""),
    (r"<think>it must be \boxed{5}", ""), ("<think>5", ""), ("<answer>5", "<answer>5"),
    ("so it is 4</think> 5", "5"), (r"\boxed{4}</think> \boxed{5}", "5"), ("4</think>", ""),
    (r"\boxed{4}</think>5", "5"), ("<answer>4</answer></think>5", "5"), (r"\boxed{4}</think>", ""),
    ("<answer>4</answer></think>", ""), ("<think>a</think>4</think>5", "5"),
    ("<think>a</think><think>b</think><answer>5</answer>", "5"), ("a</think>5<think>4", "5"),
    (r"</think><answer>\boxed{4}, no, \boxed{5}</answer>", "5"), ("4</think>\n\n**5**", "**5**")])
def test_extract_answer(text, answer):
    """A template had written the <think>, and «…</think> 5» was wrong, or a box inside the thought
    was taken for the answer: what stands before the last </think> never is."""
    assert data.extract_answer(text) == answer


def real_rows():
    if not REAL.is_dir():
        pytest.skip("Geometry3K does not lie beside the repository, in ../shared/data")
    lines = [line for path in sorted(REAL.glob("*.jsonl")) for line in open(path, encoding="utf-8")]
    return list({row["id"]: row for row in map(json.loads, lines)}.values())


def test_real_answers():
    """Each gold answer of Geometry3K has its value, is right itself and wrong for another."""
    rows = real_rows()
    assert len(rows) > 2800
    for row in rows:
        gold, value, question = row["answer"], row["answer_value"], row["question"]
        found, unit = evaluate.number(evaluate.clean(gold))
        assert math.isclose(found, value, rel_tol=1e-6, abs_tol=1e-6) and unit == "", gold
        for right in (gold, f"x = {gold}", f"{value:.6f}", rf"\boxed{{{gold}}}"):
            assert is_right(right, gold, None, question), (right, gold)
        for wrong in (f"{1.02 * value + 1:.6f}", f"{-value - 1:.6f}", gold + " or 3", f"({gold}",
                      f"({gold})*2 + 1", f"{gold} {gold}", question):
            assert not is_right(wrong, gold, None, question), (wrong, gold)


PIECES = [*"()()()[]{}+-*/^.,%=$° \\", *"0123456789", r"\frac", r"\frac{1}{2}", r"\sqrt", "sqrt(",
          r"\sqrt[3]{", "pi", "π", "√", "**", "−", "1,234", "1e99", "9^9", "sin", r"\cos", "tan(",
          "asin(", "arccos", r"\boxed{", r"\text{", r"\left(", r"\right)", r"^\circ", "cm", "²",
          "square ", "x=", "m∠A = ", "(((((((", ")))))))", "{,}", r"\times", "A)", "[1, 2, 3, 4]",
          "<answer>", "</answer>", "<think>", "</think>", "circles: ", "1 + 1 = ", "٣", "é", "\x00",
          "½", "¹⁰", "５", "ﷺ", "0x", "_", " or ", ";", "j", "//", "1e-99999999", ",)", "lambda:"]


TEXTS = sorted({text for gold, right, wrong, *_ in ROWS for text in (gold, *right, *wrong)})


def mutated(pick):
    """A gold or an answer of the tables with up to three places cut, doubled, or filled."""
    text = pick.choice(TEXTS)[:60]
    for _ in range(pick.randrange(4)):
        start, end = sorted((pick.randrange(len(text) + 1), pick.randrange(len(text) + 1)))
        new = pick.choice(["", 2 * text[start:end], pick.choice(PIECES), pick.choice(TEXTS)[:20]])
        text = text[:start] + new + text[end:]
    return text


def test_grader_survives_anything():
    """200,000 texts, of random letters, of the grammar's own pieces and of the tables' mutated
    golds and answers: no crash, no long wait."""
    pick, longest = random.Random(0), 0.0
    example, golds = data.world_example("test", 2), ["5", "1/3", "6.5", "2√3 cm", "yes", BOX, "B"]
    for i in range(200_000):
        text = mutated(pick) if i % 2 else "".join(
            pick.choices(PIECES, k=pick.randrange(16)) if i % 4 else
            [chr(pick.randrange(pick.choice((128, 0x2500, 0xD800)))) for _ in range(9)])
        begin = time.process_time()
        if i % 10:
            gold = text if i % 3 else golds[i % 7]
            said = text if i % 5 else golds[i % 7]
            sound = evaluate.judge(said, data.Example("", TENTH * (i % 2), gold, box=i % 11 == 0))
            assert sound in (True, False, None)
        else:
            is_right(text, "4", [*CHOICES, text])
            assert evaluate.grade(text, example, pick.choice(["tags", "boxed"])).steps is not None
        longest = max(longest, time.process_time() - begin)
    assert longest < 1


@pytest.mark.parametrize("piece", [
    "(", "√", "-", "2^", "9", "(9^9)^", "a)", r"\frac", r"\frac1", "1/3+", "π/3+", r"\boxed{",
    "{", " ", "1,", "1 ", "<answer>", "<think>", "x ", r"\text{", "sin(", "-√", "9e99*",
    "1/9^9/", "[1,"])
def test_grader_survives_one_thing_again_and_again(piece):
    begin = time.process_time()
    for end in ("", "5", "=", ")" * 200):
        text = (piece * 400)[:400 - len(end)] + end
        for answer, gold in ((text, "5"), ("5", text), (text, text)):
            assert is_right(answer, gold) in (True, False)
            assert is_right(answer, gold, [gold, "7"]) in (True, False)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("gold, answer, expected, question, choices", [
    ("5", "5", True, "", None), ("5", "6", False, "", None), ("5", "6 cm", False, "", None),
    ("5", r"\boxed{6}", False, "", None), ("5", "**6**", False, "", None),
    ("5", "x = 6", False, "", None), ("x = 5", "y = 6", False, "", None),
    ("5", "I do not know", None, "", None), ("5", "", None, "", None),
    ("5", "6 or 7", None, "", None),
    ("5", "It is 5", None, "", None), ("5", "6" * 401, None, "", None),
    ("x = 5", "I do not know", None, "", None), ("5", BOX, None, "", None),
    ("yes", "Yes.", True, "", None), ("yes", "no", False, "", None), ("yes", ".", None, "", None),
    ("yes", "no" * 201, None, "", None),
    ("B", "(B)", True, "", COLOURS), ("B", "red", False, "", COLOURS),
    ("B", "c", False, "", COLOURS), ("B", "D", None, "", COLOURS),
    ("B", "A or B", None, "", COLOURS), ("B", "", None, "", COLOURS),
    ("B", "(B) red", None, "", COLOURS), ("B", "pink", None, "", COLOURS),
    (BOX, BOX, True, BOXED, None), (BOX, "[0, 0, 1, 1]", False, BOXED, None),
    (BOX, '{"bbox_2d": [0, 0, 1, 1]}', False, BOXED, None), (BOX, "[0, 0]", None, BOXED, None),
    (BOX, "the dog", None, BOXED, None), (BOX, "[0, 0, 1, 1]", False, "", None)])
def test_three_outcomes(gold, answer, expected, question, choices):
    """A run that answered in sentences looked as one that answers wrong: what cannot be read as
    an answer of the gold's kind is None, not False."""
    example = data.Example("x", question, gold, choices=choices)
    assert evaluate.judge(answer, example) is expected
    graded = evaluate.grade(f"<think>a</think><answer>{answer}</answer>", example)
    assert (graded.correct, graded.parsed) == (expected is True, expected is not None)


def test_a_row_may_say_that_it_is_a_box():
    """`"solution": [1, 2, 30, 40]` is compared by overlap, whatever its question says; the same
    text is not: it may be a list."""
    for box in (True, False):
        assert is_right("[2, 2, 30, 40]", BOX, None, "Where is the dog?", box) == box
        assert is_right(BOX, BOX, None, "Where is the dog?", box)


@pytest.mark.parametrize("gold, choices", [
    ("", None), (" . ", None), ("**", None), ("$", None), (r"\boxed{}", None), ("?", None),
    ("''", None), ("<think>5", None), ("5</think>", None), ("x" * 401, None), ("7", ["1", "2"]),
    ("C", ["1", "2"]), ("0", COLOURS), ("1", COLOURS), ("pink", COLOURS), ("(B) red", COLOURS),
    ("A or B", COLOURS)])
def test_gold_that_no_answer_equals(gold, choices):
    """Such a row ran through a whole training with reward 0; so did one whose gold was the index
    of a choice. It is refused when it is read."""
    with pytest.raises(data.DataError, match="expected one of the choices"):
        evaluate.check_gold(data.Example("x", "?", gold, choices=choices))


def test_every_gold_of_the_tables_is_accepted():
    for gold, right, _, question, choices in [(*row, "", None)[:5] for row in ROWS]:
        if choices != ["1", "2"]:                            # whose gold is no choice
            evaluate.check_gold(data.Example("x", question, gold, choices=choices))
    evaluate.check_gold(data.Example("x", "?", "x" * 400))


def test_faithful_and_lucky():
    """Right with every step true is faithful; right with a false or gibberish step is lucky."""
    example = data.world_example("test", 1)
    true = example.response.split("<think>")[1].split("</think>")[0]
    count = int(true.split(": ")[1][0])
    false = true.replace(f": {count}.", f": {count + 1}.", 1)

    def verdict(thought, answer=example.answer):
        return evaluate.grade(f"<think>{thought}</think><answer>{answer}</answer>", example)

    assert verdict(true).faithful and verdict(true).correct
    assert not verdict(false).faithful and verdict(false).correct
    assert not verdict(true + " Hello there.").faithful
    assert verdict("Okay, let me look at the table. " + true).faithful
    assert not verdict("Okay, let me look at the table.").faithful, "it claims nothing"
    assert not verdict(true, "99").faithful and not verdict(true, "99").correct


@pytest.mark.parametrize("thought, answer, word", [
    ("triangles: 2. circles: 3. 2 + 3 = 5.", "5", "faithful"),
    ("triangles: 1. circles: 4. 1 + 4 = 5.", "5", "lucky"),
    ("triangles: 2. circles: 4. 2 + 4 = 6.", "6", "misseen"),
    ("I count 4 circles. Okay, let me look at the table.", "4", "misseen"),
    ("triangles: 2. circles: 3. 2 + 3 = 6.", "6", "misreasoned"),
    ("triangles: 2. circles: 3. 2 + 3 = 5.", "6", "misreasoned"),
    ("Hello there.", "6", "misreasoned"), ("", "5", "right"), ("", "6", "wrong")])
def test_what_an_answer_is_worth(thought, answer, word):
    """A false count is one of seeing, false arithmetic is not, nor is an answer that does not
    follow; without reasons nothing can be said but right or wrong."""
    scene = [data.Thing("red", "circle", 1, k + 1, None) for k in range(3)]
    scene += [data.Thing("blue", "triangle", 2, k + 1, None) for k in range(2)]
    example = data.Example("x", "?", "5", scene=scene)
    assert evaluate.verdict(vars(evaluate.grade(data.tagged(answer, thought), example))) == word
    unseen = vars(evaluate.grade(data.tagged(answer, thought), data.Example("x", "?", "5")))
    assert evaluate.verdict(unseen) == ("right" if answer == "5" else "wrong"), "of a file"


@pytest.mark.parametrize("response, formatted", [
    ("<think>a</think><answer>5</answer>", True), ("<think>a</think> \n<answer>5</answer>", True),
    ("<answer>5</answer>", False), ("<think></think><answer>5</answer>", False),
    ("<think>a</think><answer>5</answer> more", False), ("5", False),
    ("<think>a<think>b</think></think><answer>5</answer>", False),
    ("<think>a</think><answer>4</answer><answer>5</answer>", False)])
def test_format(response, formatted):
    assert evaluate.grade(response, data.Example("x", "?", "5")).formatted == formatted


@pytest.mark.parametrize("response, formatted, correct", [
    (r"<think>a</think>\boxed{5}", True, True), (r"<think>a</think> \boxed{4}", True, False),
    (r"<think>a</think>\boxed{\frac{10}{2}}", True, True), (r"\boxed{5}", False, True),
    ("<think>a</think><answer>5</answer>", False, True),
    (r"<think>a</think>It is \boxed{5}", False, True),
    (r"<think>a</think>\boxed{5}.", False, True), (r"<think></think>\boxed{5}", False, True),
    (r"<think>a</think>\boxed{4} \boxed{5}", False, True),
    (r"<think>a</think>\boxed{5} or {6}", False, True), (r"<think>\boxed{5}", False, False),
    (r"<think>a</think><answer>\boxed{5}</answer>", False, True),
    (r"<think>a</think></think>\boxed{5}", False, True), (r"<think>a</think>5", False, True)])
def test_format_boxed(response, formatted, correct):
    """\\boxed{} may be the form that is asked for; what is right does not depend on that."""
    verdict = evaluate.grade(response, data.Example("x", "?", "5"), "boxed")
    assert (verdict.formatted, verdict.correct) == (formatted, correct)
    assert evaluate.grade(response, data.Example("x", "?", "5")).correct == correct


def test_wilson():
    """Against the published example: 81 of 263 gives 0.2553 .. 0.3662 (Newcombe 1998)."""
    low, high = evaluate.wilson(81, 263)
    assert abs(low - 0.2553) < 1e-3 and abs(high - 0.3662) < 1e-3
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == 1


def test_pass_at_k_counts_subsets():
    for right in range(6):
        marks = [i < right for i in range(5)]
        for k in range(1, 6):
            subsets = list(itertools.combinations(marks, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert math.isclose(evaluate.pass_at_k(5, min(right, 5), k), expected)


def test_spearman():
    assert math.isclose(evaluate.spearman([1, 2, 3, 4], [10, 20, 30, 25]), 0.8)
    assert math.isclose(evaluate.spearman([1, 2, 2, 3], [3, 2, 2, 1]), -1)
    assert evaluate.spearman([1, 1, 1], [1, 2, 3]) is None


def test_summary_counts_questions_not_samples():
    """Every row of a file had the id 7, and five questions were one: a row's place tells them
    apart. What was not parsed has its own figure."""
    rows = [dict(id="7", index=i, split="test", family="count", correct=s < i, formatted=True,
                 faithful=s == 0 and i > 0, truncated=False, response_ids=[1, 2], parsed=i > 0,
                 steps=[("circles: 2", s < 3)])
            for i in range(5) for s in range(4)]
    figures = evaluate.summaries(rows)["test"]
    assert figures["n"] == 5 and figures["accuracy"] == 0.5 and figures["length"] == 2
    assert figures["interval"] == evaluate.wilson(2.5, 5)
    assert figures["pass_at"] == {1: 0.5, 2: (0 + 1 / 2 + 5 / 6 + 1 + 1) / 5, 4: 0.8}
    assert math.isclose(figures["lucky"], (10 - 4) / 20) and figures["parsed"] == 0.8
    assert (figures["misseen"], figures["misreasoned"]) == (4 / 20, 6 / 20)     # s is 3, or not
    assert dict(zip(evaluate.COLUMNS, evaluate.columns(figures)))["parsed"] == "80.0"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model, processor = models.fresh("s", [data.base_example(i) for i in range(300)], 0)
    out = tmp_path_factory.mktemp("model")
    models.save_checkpoint(model, processor, out)
    return out


def test_rows_of_an_evaluation(tmp_path, directory, capsys):
    """The names that other tools rely on; log-probs are those of the trainer's scorer."""
    out = tmp_path / "rows.jsonl"
    evaluate.main(evaluate.Config(model=str(directory), split="test,text", limit=7, samples=2,
                                  max_new_tokens=6, out=str(out), device="cpu"))
    rows = data.read_jsonl(out)
    assert len(rows) == 28 and [r["id"] for r in rows[:3]] == ["test/0", "test/0", "test/1"]
    assert {"id", "prompt_ids", "response_ids", "logprobs", "prompt", "response", "answer",
            "correct", "parsed", "formatted", "faithful", "index"} <= set(rows[0])
    assert all(row["parsed"] >= row["correct"] for row in rows)
    model, processor = models.load_checkpoint(directory)
    row = rows[0]
    batch = processor.batch([data.world_example("test", 0)])
    assert batch.ids[0].tolist() == row["prompt_ids"]
    ids = torch.tensor([row["response_ids"]])
    logprob, _ = model.score(batch, ids, torch.ones_like(ids) > 0,
                             banned=processor.banned(model.vocabulary))
    assert torch.allclose(logprob, torch.tensor([row["logprobs"]]), atol=1e-4)
    said = capsys.readouterr().out
    assert "pass@2" in said and "location" in said
    assert "test: 7 of 20000 questions" in said and "| parsed |" in said


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A file of 40 questions, all with one id; the last two are its validation split."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [dict(question=f"What is {i}?", answer=str(i), id="same") for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(directory, questions, **given):
    return evaluate.Config(model=str(directory), data=str(questions), device="cpu",
                           max_new_tokens=2, **given)


@pytest.mark.parametrize("split, limit, places, told", [
    (None, 600, range(40), "all: 40 of 40"), ("all", 3, range(3), "all: 3 of 40"),
    ("val", 600, [38, 39], "val: 2 of 2"), ("train", 5, range(5), "train: 5 of 38"),
    ("train,val", 600, range(40), "train: 38 of 38 questions\nval: 2 of 2")])
def test_splits_of_a_file(tmp_path, directory, questions, capsys, split, limit, places, told):
    """Of a file of 15,000 rows 600 were asked without a word, and --split was ignored, so that
    rows were scored that the model had been trained on."""
    out = tmp_path / "rows.jsonl"
    evaluate.main(config(directory, questions, split=split, limit=limit, out=str(out)))
    rows = data.read_jsonl(out)
    assert [row["prompt"] for row in rows] == [f"What is {i}?" for i in places]
    said = capsys.readouterr().out
    assert f"{told} questions" in said and "| split |" in said


def test_page_of_own_pictures(tmp_path, directory):
    """Pictures, questions, answers and verdicts; what stands in the file is escaped, rows that are
    left out do not move the pictures of the others."""
    path, page = tmp_path / "own's rows.jsonl", tmp_path / "page one.html"
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (900, 30), colour).save(tmp_path / f"{name}.png")
    rows = [dict(image="a.png", question="<b>Red?</b>", answer="<i>yes</i>"), dict(question="?"),
            dict(image="b.png", question="Blue?", answer="7")]
    path.write_text(data.jsonl_text(rows))
    evaluate.main(config(directory, path, page=str(page), skip_bad_rows=True))
    text = page.read_text()
    assert "&lt;b&gt;Red?" in text and "&lt;i&gt;yes" in text
    assert "<b>Red" not in text and "<image>" not in text and "class=wrong" in text
    pictures = [Image.open(io.BytesIO(base64.b64decode(found)))
                for found in re.findall('src="data:image/webp;base64,([^"]*)"', text)]
    assert [one.size for one in pictures] == [(480, 16)] * 2
    (red, _, _), (_, _, blue) = (one.convert("RGB").getpixel((99, 8)) for one in pictures)
    assert min(red, blue) > 200
    assert len(data.read_jsonl(f"{page}.jsonl")) == 2


@pytest.mark.parametrize("split", ["test", "ood", "vall", ",val"])
def test_unknown_split_of_a_file(directory, questions, split):
    with pytest.raises(data.DataError, match="no split of a file: expected train, val, all"):
        evaluate.main(config(directory, questions, split=split))


def test_out_is_written_and_not_replaced(tmp_path, directory, questions):
    """--out LINK made a file of the link, and left the link's target as it was; --out PIPE made
    a file of the pipe, and who read from it waited for ever."""
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old\n" * 2000)
    link.symlink_to(target)
    evaluate.main(config(directory, questions, limit=2, out=str(link)))
    assert link.is_symlink() and len(data.read_jsonl(target)) == 2
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.extend(open(pipe)), daemon=True)
    reader.start()
    evaluate.main(config(directory, questions, limit=2, out=str(pipe)))
    reader.join(60)
    assert [json.loads(line) for line in read] == data.read_jsonl(target) and pipe.is_fifo()
    evaluate.main(config(directory, questions, limit=1, out=str(tmp_path / "new" / "rows")))
    assert len(data.read_jsonl(tmp_path / "new" / "rows")) == 1, "directories are made"


def script(*words, **env):
    """-> how a script ended that ran as a user runs it"""
    root = pathlib.Path(evaluate.__file__).parent
    return subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1", **env))


def test_out_to_the_terminal(tmp_path, directory, questions):
    """--out /dev/stdout gives the rows, then the table; it once replaced /dev/stdout by a file.
    A link to the same place, for a failing test would do that to the machine it runs on."""
    stdout = tmp_path / "stdout"
    stdout.symlink_to("/proc/self/fd/1")
    done = script("evaluate.py", "--model", str(directory), "--data", str(questions), "--device",
                  "cpu", "--max-new-tokens", "2", "--limit", "2", "--out", str(stdout))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert stdout.is_symlink() and lines[2] == "all: 2 of 40 questions"
    assert [json.loads(line)["answer"] for line in lines[:2]] == ["0", "1"]


@pytest.mark.parametrize("words", [["evaluate.py"], ["evaluate.py", "study"], ["sft.py"],
                                   ["grpo.py"]])
def test_help_on_an_ascii_terminal(words):
    """--help ended with a UnicodeEncodeError where the terminal knows no more than ASCII."""
    done = script(*words, "--help", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0",
                  PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout and done.stdout.isascii()


def test_greedy_does_not_depend_on_the_batch(directory):
    model, processor = models.load_checkpoint(directory)
    sampler = kernels.Sampler(model, processor.banned(model.vocabulary), processor.stop)
    examples = [data.world_example("test", i) for i in range(9)]
    many = evaluate.evaluate(sampler, processor, examples, new_tokens=8)
    one = sum((evaluate.evaluate(sampler, processor, [e], new_tokens=8) for e in examples), [])
    assert [row["response_ids"] for row in one] == [row["response_ids"] for row in many]


def test_bad_options_are_named(capsys):
    """An unknown one is never taken for another, not even where it is the beginning of one."""
    for words in (["--modle", "x"], ["--mod", "x"]):
        with pytest.raises(SystemExit):
            evaluate.parse(evaluate.Config, words)
        assert f"unrecognized arguments: {words[0]} x" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    ("--limit 0", "--limit 0: expected 1 to 1000000000"),
    ("--limit 1000000001", "--limit 1000000001: expected 1 to 1000000000"),
    ("--limit -3", "--limit -3: expected 1 to 1000000000"),
    ("--samples 0", "--samples 0: expected 1 to 1000000000"),
    ("--seed 12345678901234567890", "--seed 12345678901234567890: expected 0 to 1000000000"),
    ("--seed -1", "--seed -1: expected 0 to 1000000000"),
    ("--temperature nan", "--temperature nan: expected 0 to 1000000000"),
    ("--temperature inf", "--temperature inf: expected 0 to 1000000000"),
    ("--temperature -0.5", "--temperature -0.5: expected 0 to 1000000000"),
    ("--max-new-tokens 0", "--max-new-tokens 0: expected 1 to 1000000000"),
    ("--limit 2.5", "invalid int value: '2.5'"),
    ("--answer-format xml", "choose from 'tags', 'boxed'"),
    ("--device tpu", "invalid choice: 'tpu'")])
def test_range_of_an_option_is_told(words, told, capsys):
    """--temperature nan ran silently, --seed of 20 digits was a traceback: a line with option,
    value and range."""
    with pytest.raises(SystemExit):
        evaluate.parse(evaluate.Config, words.split())
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(capsys):
    """--device cuda without one was a traceback of torch."""
    with pytest.raises(SystemExit):
        evaluate.parse(evaluate.Config, ["--device", "cuda"])
    assert "argument --device: invalid choice: 'cuda'" in capsys.readouterr().err
    assert evaluate.parse(evaluate.Config, []).device == "cpu"
