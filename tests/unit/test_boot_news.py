"""What a person is told of a boot while it goes on."""

from gridcloud.site.booting import _worth_telling

LOG = """\
Cloud-init v. 22.4.2 running 'init' of a boot
ci-info: +++++++++++++++Net device info+++++++++++++++
ci-info: |  eth0  | True | 10.214.7.181 |
Generating public/private ed25519 key pair.
Your identification has been saved in /etc/ssh/ssh_host_ed25519_key
The key fingerprint is:
SHA256:6GrRyWf+FFG9JEmCdv3K4Tj66dRKV/VSgQxrK/mYif4 root@work
The key's randomart image is:
+--[ED25519 256]--+
|         ..+=o.. |
+----[SHA256]-----+
installing what was asked
| this is a line of a person's own script, not a picture
"""


def test_tables_and_pictures_of_a_boot_are_left_out():
    """What every boot prints tells nobody anything; what a script prints stays."""
    assert _worth_telling(LOG).splitlines() == [
        "Cloud-init v. 22.4.2 running 'init' of a boot",
        "installing what was asked",
        "| this is a line of a person's own script, not a picture",
    ]
