# What gridcloud does at every boot of a machine, before an SSH server starts: all of it again or
# not at all, with the same result. The variables it needs stand above.
set -u
umask 022
PATH=$PATH:/usr/sbin:/sbin:/usr/bin:/bin
folder=/var/lib/gridcloud
mkdir -p "$folder"
# Kept, since what the machine was told besides may replace the files that are written here.
case "$0" in "$folder"/*) ;; *) (umask 077 && cp "$0" "$folder/prepare.sh") ;; esac

# 1. Its end, before anything that may fail.
if [ -n "$ends_epoch" ]; then
    printf '%s' "$end_script" >"$folder/end.sh.new" && chmod 755 "$folder/end.sh.new" &&
        mv -f "$folder/end.sh.new" "$folder/end.sh"
    sh "$folder/end.sh" first "$ends_epoch" "$ends_seconds" "$lease"
    if [ -d /run/systemd/system ]; then
        # Started from here, where the end of this lease is known, and never by itself before: an
        # image may have been made of a machine that has ended. The second unit starts it after a
        # reboot in case cloud-init was switched off.
        units=/etc/systemd/system
        printf '%s\n' '[Unit]' 'Description=End of this machine (gridcloud)' \
            'DefaultDependencies=no' '[Service]' "ExecStart=/bin/sh $folder/end.sh watch" \
            'Restart=always' 'RestartSec=5' >"$units/gridcloud-end.service"
        printf '%s\n' '[Unit]' 'Description=Start the watch for the end of this machine' \
            'After=cloud-init.service cloud-init-network.service' '[Service]' 'Type=oneshot' \
            'ExecStart=/bin/sh -c "systemctl start --no-block gridcloud-end.service"' \
            '[Install]' 'WantedBy=multi-user.target' >"$units/gridcloud-end-start.service"
        [ -L "$units/multi-user.target.wants/gridcloud-end-start.service" ] ||
            systemctl enable gridcloud-end-start.service
        systemctl daemon-reload
        systemctl start --no-block gridcloud-end.service
    else
        pid=$(cat /run/gridcloud-end.pid 2>/dev/null)
        if [ -z "$pid" ] || ! grep -qs end.sh "/proc/$pid/cmdline"; then
            setsid sh "$folder/end.sh" watch </dev/null >/dev/null 2>&1 &
            echo $! >/run/gridcloud-end.pid
        fi
    fi
fi

# 2. The account to log in to, which may do everything here and has no password.
if [ "$user" != root ]; then
    if ! id "$user" >/dev/null 2>&1; then
        shell=/bin/sh
        [ -x /bin/bash ] && shell=/bin/bash
        useradd -m -s "$shell" "$user" 2>/dev/null || adduser -D -s "$shell" "$user"
    fi
    for group in adm sudo wheel video render systemd-journal; do
        if grep -q "^$group:" /etc/group; then
            usermod -a -G "$group" "$user" 2>/dev/null || addgroup "$user" "$group" 2>/dev/null
        fi
    done
    # A locked account ("!") is refused by some SSH servers; "*" has no password either.
    case "$(sed -n "s/^$user:\([^:]*\):.*/\1/p" /etc/shadow 2>/dev/null)" in
        '!'*) usermod -p '*' "$user" 2>/dev/null || echo "$user:*" | chpasswd -e 2>/dev/null ;;
    esac
    mkdir -p -m 750 /etc/sudoers.d
    echo "$user ALL=(ALL) NOPASSWD:ALL" >/etc/sudoers.d/99-gridcloud
    chmod 440 /etc/sudoers.d/99-gridcloud
    root_login=no
else
    root_login=prohibit-password
fi

# 3. Whom it lets in, and what it proves itself with. The first value of a setting counts, and what
#    stands above any Match is for all.
ssh=/etc/ssh
mkdir -p "$ssh/gridcloud_principals"
(umask 077 && printf '%s' "$host_key" >"$ssh/gridcloud_host_key.new")
mv -f "$ssh/gridcloud_host_key.new" "$ssh/gridcloud_host_key"
printf '%s\n' "$ca" >"$ssh/gridcloud_ca.pub"
rm -f "$ssh"/gridcloud_principals/*
printf '%s\n' "$lease" >"$ssh/gridcloud_principals/$user"
block() {
    printf '%s\n' '# BEGIN gridcloud' "HostKey $ssh/gridcloud_host_key" \
        "TrustedUserCAKeys $ssh/gridcloud_ca.pub" \
        "AuthorizedPrincipalsFile $ssh/gridcloud_principals/%u" 'PubkeyAuthentication yes' \
        'PasswordAuthentication no' 'ChallengeResponseAuthentication no' \
        'PermitEmptyPasswords no' "PermitRootLogin $root_login" '# END gridcloud'
}
config=$ssh/sshd_config
if [ -f "$config" ]; then
    { block && sed '/^# BEGIN gridcloud$/,/^# END gridcloud$/d' "$config"; } >"$folder/sshd.new"
elif [ -f /usr/etc/ssh/sshd_config ]; then
    config=$ssh/sshd_config.d/00-gridcloud.conf
    mkdir -p "$ssh/sshd_config.d" && block >"$folder/sshd.new"
else
    exit 0 # no SSH server yet; if one is installed now, this runs once more after that
fi
if ! cmp -s "$folder/sshd.new" "$config"; then
    cat "$folder/sshd.new" >"$config"
    if [ -d /run/systemd/system ]; then
        for unit in ssh sshd; do systemctl try-reload-or-restart --no-block $unit 2>/dev/null; done
    else
        for pid in /run/sshd.pid /var/run/sshd.pid; do
            [ -f "$pid" ] && kill -HUP "$(cat "$pid")" 2>/dev/null && break
        done
    fi
fi
rm -f "$folder/sshd.new"
exit 0
