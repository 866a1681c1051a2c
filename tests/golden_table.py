"""placeholder"""


def table(differences, contents):
    return ""
