"""The icon families that ``idml.data.embedded.icons`` draws from, and the names that it leaves out."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """One npm package of a family.

    Attributes:
        package: @iconify-json/<package>.
        version: of the npm package.
        styles: how the family spells the icon of a name, the preferred style first. The plain or outlined style comes
            before the filled one, and sizes of about 24 units before others.
    """

    package: str
    version: str
    styles: tuple[str, ...] = ("{}",)


LICENCES = ("MIT", "Apache-2.0", "ISC", "CC0-1.0", "Unlicense", "BSD-3-Clause")
"""SPDX names of the licences that are taken. Left out are CC-BY (Font Awesome, Solar, Streamline, CoreUI, Codicons),
CC-BY-SA, GPL, OFL and MPL, although the first of them would allow it too."""

FAMILIES: dict[str, tuple[Source, ...]] = {
    "akar-icons": (Source("akar-icons", "1.2.7", ("{}", "{}-fill")),),
    "ant-design": (Source("ant-design", "1.2.9", ("{}-outlined", "{}-filled")),),
    "bitcoin-icons": (Source("bitcoin-icons", "1.2.5", ("{}-outline", "{}-filled")),),
    "bootstrap": (Source("bi", "1.2.7", ("{}", "{}-fill")),),
    "boxicons": (Source("bx", "1.2.3"),),
    "bytesize": (Source("bytesize", "1.2.2"),),
    "carbon": (Source("carbon", "1.2.29", ("{}", "{}-outline", "{}-filled")),),
    "charm": (Source("charm", "1.2.3"),),
    "clarity": (Source("clarity", "1.2.4", ("{}-line", "{}-solid")),),
    "cuida": (Source("cuida", "1.2.5", ("{}-outline", "{}-filled")),),
    "dinkie-icons": (Source("dinkie-icons", "1.2.0", ("{}", "{}-filled")),),
    "element-plus": (Source("ep", "1.2.4", ("{}", "{}-filled")),),
    "eos-icons": (Source("eos-icons", "1.2.4", ("{}", "{}-outlined", "{}-filled")),),
    "eva": (Source("eva", "1.2.3", ("{}-outline", "{}-fill")),),
    "evil-icons": (Source("ei", "1.2.2"),),
    "feathericon": (Source("fe", "1.2.4"),),
    "flowbite": (Source("flowbite", "1.2.7", ("{}-outline", "{}-solid")),),
    "fluent": (
        Source(
            "fluent",
            "1.2.60",
            (
                "{}-24-regular",
                "{}-20-regular",
                "{}-16-regular",
                "{}-28-regular",
                "{}-32-regular",
                "{}-48-regular",
                "{}-24-filled",
                "{}-20-filled",
                "{}-16-filled",
            ),
        ),
        Source("fluent-mdl2", "1.2.1"),
        Source("fluent-emoji-high-contrast", "1.2.6"),
    ),
    "fontisto": (Source("fontisto", "1.2.1"),),
    "formkit": (Source("formkit", "1.2.2"),),
    "foundation": (Source("foundation", "1.2.1"),),
    "framework7": (Source("f7", "1.2.2", ("{}", "{}-fill")),),
    "garden": (Source("garden", "1.2.6", ("{}-stroke-16", "{}-16", "{}-fill-16", "{}-stroke-12")),),
    "gg": (Source("gg", "1.2.2"),),
    "google-material": (
        Source("material-symbols", "1.2.93", ("{}-outline", "{}")),
        Source("ic", "1.2.4", ("outline-{}", "baseline-{}")),
        Source("mdi", "1.2.3", ("{}-outline",)),
    ),
    "gravity-ui": (Source("gravity-ui", "1.2.15", ("{}", "{}-fill")),),
    "grommet": (Source("grommet-icons", "1.2.4"),),
    "halfmage": (
        Source("majesticons", "1.2.5", ("{}-line", "{}")),
        Source("pixelarticons", "1.2.9"),
    ),
    "healthicons": (Source("healthicons", "1.2.13", ("{}-outline", "{}")),),
    "heroicons": (
        Source("heroicons", "1.2.3", ("{}", "{}-solid")),
        Source("sidekickicons", "1.2.1", ("{}", "{}-solid")),
    ),
    "hugeicons": (Source("hugeicons", "1.2.35", ("{}", "{}-01")),),
    "humbleicons": (Source("humbleicons", "1.2.20"),),
    "icon-park": (Source("icon-park-outline", "1.2.4", ("{}", "{}-one")),),
    "iconoir": (Source("iconoir", "1.2.11", ("{}", "{}-solid")),),
    "icons8": (
        Source("la", "1.2.1", ("{}", "{}-solid")),
        Source("icons8", "1.2.1"),
        Source("wpf", "1.2.0"),
    ),
    "ionicons": (Source("ion", "1.2.7", ("{}-outline",)), Source("famicons", "1.2.2", ("{}-outline", "{}"))),
    "iwwa": (Source("iwwa", "1.2.1", ("{}", "{}-o")),),
    "ix": (Source("ix", "1.2.12", ("{}", "{}-filled")),),
    "jam": (Source("jam", "1.2.3", ("{}", "{}-f")),),
    "lineicons": (Source("lineicons", "1.2.6"),),
    "lsicon": (Source("lsicon", "1.2.5", ("{}-outline", "{}-filled")),),
    "lucide": (
        Source("lucide", "1.2.137"),
        Source("lucide-lab", "1.2.3"),
        Source("feather", "1.2.1"),
        Source("meteor-icons", "1.2.8"),
    ),
    "mage": (Source("mage", "1.2.4", ("{}", "{}-fill")),),
    "maki": (Source("maki", "1.2.5"),),
    "mingcute": (Source("mingcute", "1.2.8", ("{}-line", "{}-fill")),),
    "mono": (Source("mi", "1.2.2"),),
    "mynaui": (Source("mynaui", "1.2.19", ("{}", "{}-solid")),),
    "nimbus": (Source("nimbus", "1.2.1"),),
    "octicon": (Source("octicon", "1.2.36", ("{}-24", "{}-16")),),
    "ooui": (Source("ooui", "1.2.24", ("{}", "{}-ltr")),),
    "open-iconic": (Source("oi", "1.2.0"),),
    "oui": (Source("oui", "1.2.6"),),
    "pajamas": (Source("pajamas", "1.2.15"),),
    "phosphor": (Source("ph", "1.2.2", ("{}", "{}-fill")),),
    "primeicons": (Source("prime", "1.2.5", ("{}", "{}-o")),),
    "proicons": (Source("proicons", "1.2.20"),),
    "qlementine": (Source("qlementine-icons", "1.2.16", ("{}-24", "{}-16", "{}-32")),),
    "quill": (Source("quill", "1.2.4"),),
    "raphael": (Source("raphael", "1.2.1"),),
    "radix": (Source("radix-icons", "1.2.6"),),
    "remix": (Source("ri", "1.2.10", ("{}-line", "{}-fill")),),
    "rivet": (Source("rivet-icons", "1.2.2", ("{}", "{}-solid")),),
    "sargam": (Source("si", "1.2.17", ("{}-line", "{}-fill")),),
    "simple-line": (Source("simple-line-icons", "1.2.1"),),
    "stash": (Source("stash", "1.2.4", ("{}", "{}-solid")),),
    "system-uicons": (Source("system-uicons", "1.2.4"),),
    "tabler": (Source("tabler", "1.2.41", ("{}", "{}-filled")),),
    "tdesign": (Source("tdesign", "1.2.19", ("{}", "{}-filled")),),
    "teenyicons": (Source("teenyicons", "1.2.2", ("{}-outline", "{}-solid")),),
    "topcoat": (Source("topcoat", "1.2.0"),),
    "temaki": (Source("temaki", "1.2.6"),),
    "uiw": (Source("uiw", "1.2.4", ("{}", "{}-o")),),
    "unicons": (Source("uil", "1.2.3"),),
    "vaadin": (Source("vaadin", "1.2.1", ("{}", "{}-o")),),
    "weui": (Source("weui", "1.2.4", ("{}-outlined", "{}-filled")),),
    "zondicons": (Source("zondicons", "1.2.2"),),
}
"""A family is the work of one team: packages that one team drew, or drew over another's, are one family. So are Lucide,
Feather, which it goes on with, and Meteor (a third of whose drawings are Lucide's), Ionicons and its fork Famicons,
and Google's Material Icons and the community's Material Design Icons, which began as a supplement to them (a quarter
alike). The packages of a family are in order of preference. Versions are those that the set was built from."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


BRANDS = _words(
    """
    adobe airplay alipay amazon android app-store apple behance bitbucket bitcoin bitcoin-circle blogger bluetooth
    chrome codepen creative-commons css css3 discord docker dribbble dropbox facebook figma firefox flickr git github
    gitlab google google-drive google-play google-plus html5 instagram java javascript linkedin linux logo-facebook
    logo-github markdown mastercard mastodon medium messenger meta microsoft npm opera patreon paypal pinterest pocket
    python quora react reddit safari skype slack snapchat soundcloud spotify steam stripe telegram threads tiktok
    trello tumblr twitch twitter ubuntu vimeo visa vk vuejs webhook wechat whatsapp windows wordpress x youtube
    """
)
"""Marks, which every family copies from their owner; a copyright licence does not cover them either."""

AMBIGUOUS = _words(
    """
    ai album align-center align-justify align-left align-right badge block board bolt bow branch button capsule cross
    dashboard diamond enter exit female flip-horizontal flip-vertical football fork forward frame graph group
    hamburger help hotel info information line male mask match merge network node note number nut open pointer present
    question radio record run scale script select sign signal slide split stamp stop switch tab tank thread track tree
    water wave weight window zoom
    """
)
"""Names with several meanings, where several families draw another meaning than the rest do: a nut grows or is screwed,
``scale`` weighs or resizes, ``stop`` is a square, a sign or a ban, ``tab`` a key, a folder's or a browser's,
``align-left`` aligns lines or objects, and what some call ``flip-vertical`` others call ``flip-horizontal``. The mouse,
nearly always the device, stays."""


def _groups(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(group.split()) for group in text.split(";"))


SYNONYMS = _groups(
    """
    plus add; plus-circle add-circle; minus remove subtract; x-circle close-circle; question-circle help-circle;
    info-circle alert-circle; warning alert exclamation-triangle; check checkmark; check-square checkbox;
    trash delete; settings setting gear cog; user person; users people user-group; user-plus user-add person-add;
    user-minus user-remove; mail email envelope; mail-open envelope-open; comment chat message chat-bubble;
    image picture photo; thumbs-up thumb-up like; thumbs-down thumb-down dislike; lightbulb bulb light-bulb;
    lightning flash; fire flame; location map-pin map-marker; clock time; alarm alarm-clock; stopwatch timer;
    shopping-cart cart; basket shopping-basket; shopping-bag bag; luggage suitcase; save floppy-disk; printer print;
    pencil pen; copy duplicate; refresh reload sync rotate; repeat loop; eye view; eye-off eye-slash;
    bell notification notifications; bell-off bell-slash; microphone mic; microphone-off mic-off;
    volume-mute volume-off; volume-up volume volume-high volume-2; volume-down volume-low volume-1;
    video video-camera; film movie; menu bars; list list-bullet; ordered-list list-numbered;
    more ellipsis more-horizontal; more-vertical ellipsis-vertical dots-vertical; grid apps grid-view layout-grid;
    expand maximize fullscreen full-screen; login log-in sign-in; logout log-out sign-out; share share-alt;
    paperclip attach attachment; send paper-plane; globe earth world; airplane plane; train subway tram; ship boat;
    truck delivery-truck; shop store; cake birthday-cake; coffee cup; t-shirt shirt; flask beaker;
    bar-chart chart chart-column; layers stack; box package; database data; hard-drive hdd; cpu chip microchip;
    desktop monitor computer; phone call telephone; mobile smartphone mobile-phone; library books;
    folder-plus folder-add; folder-minus folder-remove; file document; file-plus file-add; bookmark-plus bookmark-add;
    award ribbon; filter funnel; sliders equalizer; contrast adjust; sun brightness; drop droplet;
    cloud-rain rain cloud-drizzle; cloud-lightning thunderstorm; cloud-upload cloud-arrow-up; snowflake snow;
    cut scissors; magic-wand magic wand; sparkle sparkles; brush paint-brush paintbrush; eyedropper color-picker;
    underline text-underline; text font; hash hashtag; percent percentage; target bullseye; crosshair crosshairs;
    thermometer temperature; power power-off; activity pulse; smile smiley happy; sad frown; meh face-neutral;
    qr-code qrcode; money cash; zoom-in search-plus; zoom-out search-minus; skip-forward next step-forward;
    skip-back previous step-backward; rewind backward; chevron-left angle-left left; chevron-right angle-right right;
    chevron-up up; chevron-down down; chevron-double-left chevrons-left; chevron-double-right chevrons-right;
    chevron-double-up chevrons-up; chevron-double-down chevrons-down; arrow-right arrow-forward;
    swap transfer exchange; clipboard-check task; sticker sticky-note; lifebuoy support; unlock lock-open;
    headphones headphone; tag label; puzzle puzzle-piece; exclamation exclamation-mark; home house; bicycle bike;
    newspaper news; highlighter highlight; rotate-left reset; receipt invoice
    """
)
"""Names of one thing, of which the one with the most drawings stays."""
