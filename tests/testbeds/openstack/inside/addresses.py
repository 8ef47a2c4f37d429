"""Stands for neutron's router agent: floating addresses lead to the machines they belong to."""

import subprocess
import time

import pymysql

_CHAIN = "floating"
_QUERY = (
    "select floating_ip_address, fixed_ip_address from floatingips"
    " where fixed_ip_address is not null order by 1"
)


def iptables(*arguments):
    subprocess.run(["iptables", "--wait", "-t", "nat", *arguments], check=True)


def main():
    iptables("-N", _CHAIN)
    iptables("-A", "PREROUTING", "-j", _CHAIN)
    database = pymysql.connect(
        host="127.0.0.1",
        user="openstack",
        password="openstack",
        database="neutron",
        autocommit=True,
    )
    known = ()
    while True:
        with database.cursor() as cursor:
            cursor.execute(_QUERY)
            there = cursor.fetchall()
        if there != known:
            iptables("-F", _CHAIN)
            for outer, inner in there:
                iptables("-A", _CHAIN, "-d", outer, "-j", "DNAT", "--to-destination", inner)
            known = there
        time.sleep(0.3)


main()
